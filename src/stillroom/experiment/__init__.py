"""A study's stages, and its trials on one machine or many."""
