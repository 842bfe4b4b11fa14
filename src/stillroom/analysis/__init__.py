"""From results on disk to an answer, its figures and its report. Needs no model and no Ray."""
