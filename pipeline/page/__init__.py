"""A local page to try the worker and to tune its parameters by eye: python -m pipeline.page."""
