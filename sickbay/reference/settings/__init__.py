"""What may be set, checked, named, and kept beside a run."""
