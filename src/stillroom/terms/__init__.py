"""What the student is asked for: the loss terms."""
