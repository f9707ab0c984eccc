"""Where a face lies in its frame: an affine map (`place`), on whole pixels as upstream (`upstream`) or not (`subpixel`)."""
