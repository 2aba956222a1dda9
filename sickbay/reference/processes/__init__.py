"""The same loop on several processes."""
