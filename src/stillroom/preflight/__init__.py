"""What a study will cost, and whether it can run here."""
