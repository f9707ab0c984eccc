"""Generated faces back into their frames: the mask, the official paste, the natural finish."""
