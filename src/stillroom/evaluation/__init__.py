"""What a model answers, and what that is worth."""
