"""A model at a pinned revision: loaded, checked against its own path, run, sized."""
