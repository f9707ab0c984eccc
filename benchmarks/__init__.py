"""Measurements: each module ends with one line of JSON and states hardware, batch and dtype."""
