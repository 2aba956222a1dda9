"""Memory issues: what does not fit, what fills it, and what is never given back."""
