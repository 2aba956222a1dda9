"""Text to ids and back: tokenizers, and vocabularies that shrink."""
