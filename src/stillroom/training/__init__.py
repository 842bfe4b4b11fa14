"""One trial: a student, its batches, its steps, its checkpoints."""
