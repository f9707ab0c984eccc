"""A clip prepared once: what depends on the source alone, one entry a frame, and a cache of it by content."""

from musetalk.avatar.cache import AvatarCache, cache_key
from musetalk.avatar.entries import CHUNK_FRAMES, Avatar, Face

__all__ = ["CHUNK_FRAMES", "Avatar", "AvatarCache", "Face", "cache_key"]
