"""Where things lie: boxes on whole pixels, places between them, and the maps from one to the other."""
