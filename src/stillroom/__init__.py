"""stillroom: what is each signal of a teacher worth when a small language model is distilled from it?"""

__version__ = "0.1.0"
