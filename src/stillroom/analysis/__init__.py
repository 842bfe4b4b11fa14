"""From results on disk to an answer: frame · statistics · figures · report. Needs no model and no Ray."""
