"""Speech in, audio tokens for each video frame out."""
