"""Frames in, faces out: detection, landmarks, tracking."""
