"""Operations on pixels that know nothing of faces: resampling, colour, work on many frames at once."""
