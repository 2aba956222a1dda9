"""Generation issues: what the trained model says, and how it is made to say it."""
