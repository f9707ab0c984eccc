"""The worker around the model: requests, downloads, media, storage, metrics and the two front doors."""
