"""Generated faces back into their frames: parsed masks, the paste, the natural finish."""
