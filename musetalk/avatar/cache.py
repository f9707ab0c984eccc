"""A cache of avatars by content, on disk and in memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections import OrderedDict
from io import BytesIO
from pathlib import Path

from musetalk.avatar.entries import FORMAT, MEMORY, STALE_SEC, SUFFIX, Avatar


class AvatarCache:
    """Avatars by key, on disk (at most `limit` bytes) and in memory (`memory` bytes), least recently used first out.

    Safe to share between workers: writes are atomic renames, reads verify every byte, so a torn, corrupt or foreign file
    is only a miss. A folder that cannot be written leaves what memory holds, and never fails a job. `folder` None: no cache.
    """

    def __init__(self, folder: Path | None, limit: int, memory: int = MEMORY) -> None:
        self.folder, self.limit, self.memory = folder, limit, memory
        self._recent: OrderedDict[str, bytes] = OrderedDict()

    def path(self, key: str) -> Path | None:
        """Where the avatar of `key` lies."""
        return self.folder / f"{key}{SUFFIX}" if self.folder and self.limit > 0 else None

    def get(self, key: str, frames: int = 0) -> Avatar | None:
        """The cached avatar, marked as just used; None unless it holds the whole clip or at least `frames` of it."""
        path = self.path(key)
        if path is None:
            return None
        avatar = Avatar.open(BytesIO(self._recent[key]) if key in self._recent else path, key)
        if avatar is None:
            return None
        if not avatar.complete and len(avatar) < frames:
            avatar.close()
            return None
        self._remember(key, avatar)
        with contextlib.suppress(OSError):
            os.utime(path)
        return avatar

    def put(self, key: str, avatar: Avatar) -> bool:
        """Keep a finished avatar; False when the folder cannot be written."""
        path = self.path(key)
        if path is None:
            return False
        self._remember(key, avatar)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            avatar.save(path, key)
            self._trim(path)
        except OSError:
            return False
        return True

    def _remember(self, key: str, avatar: Avatar) -> None:
        """Keep the avatar in memory as the one used last."""
        if key not in self._recent and avatar.size <= self.memory:
            avatar.write(blob := BytesIO(), key)
            self._recent[key] = blob.getvalue()
        if key in self._recent:
            self._recent.move_to_end(key)
        while sum(map(len, self._recent.values())) > self.memory:
            self._recent.popitem(last=False)

    def _trim(self, newest: Path) -> None:
        """Remove the least recently used files over the limit, and stale partial ones."""
        entries = []
        for path in newest.parent.iterdir():
            with contextlib.suppress(OSError):
                stat = path.stat()
                if path.suffix == ".part" and time.time() - stat.st_mtime > STALE_SEC:
                    path.unlink()
                elif path.suffix == SUFFIX:
                    entries.append((stat.st_mtime, stat.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries, key=lambda e: e[:2]):
            if total <= self.limit:
                break
            with contextlib.suppress(OSError):
                path.unlink()
                total -= size


def cache_key(*parts: object) -> str:
    """sha256 of the parts' JSON: content hash, parameters, weights' identity."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True, default=str).encode()).hexdigest()
