"""The worker around the model: requests, downloads, media, storage, metrics and the two front doors."""

__version__ = "0.2.0"
