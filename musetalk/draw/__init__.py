"""Face crops and audio tokens in, generated faces out."""
