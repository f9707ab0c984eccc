"""A cache of avatars by content, on disk and in memory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from musetalk.avatar.entries import FORMAT, Avatar

MEMORY = 64 << 20  # bytes of avatars kept in memory: about a thousand frames
SUFFIX = ".avatar"
WHOLE = 1 << 62  # frames that an avatar of a whole clip answers for
STALE_SEC = 24 * 3600  # partial files of workers that died are removed after this
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class Stored(NamedTuple):
    """A file of the cache."""

    used: int  # when it was last used, ns
    size: int
    path: Path


class AvatarCache:
    """Avatars by key, on disk (at most `limit` bytes) and in memory (`memory` bytes), least recently used first out.

    A clip is prepared as far as a speech needs it, so a key may be put several times, each time with more frames. The file's
    name states how many (`KEY-25.avatar`, `KEY-whole.avatar`): a file is never replaced by one with fewer frames, whatever
    other workers do at the same time, and is removed once one with more lies there.

    Safe to share between workers: writes are atomic renames, reads verify every byte, so a torn, corrupt or foreign file
    is only a miss. A folder that cannot be written leaves what memory holds, and never fails a job. `folder` None: no cache.
    """

    def __init__(self, folder: Path | None, limit: int, memory: int = MEMORY) -> None:
        self.folder = folder if limit > 0 else None
        self.limit, self.memory = limit, memory
        self._recent: OrderedDict[str, tuple[int, bytes]] = OrderedDict()  # key -> frames, file; the latest last

    def get(self, key: str, frames: int = 0) -> Avatar | None:
        """The cached avatar, marked as just used; None unless it holds the whole clip or at least `frames` of it."""
        if self.folder is None:
            return None
        have, blob = self._recent.get(key, (-1, b""))
        avatar = Avatar.open(BytesIO(blob), key) if have >= frames else self._read(key, frames)
        if avatar is not None:
            self._remember(key, avatar)
            self._mark_used(key)
        return avatar

    def put(self, key: str, avatar: Avatar) -> bool:
        """Keep a finished avatar; False when it lies in no file now."""
        if self.folder is None:
            return False
        self._remember(key, avatar)
        try:
            stored = self._read(key, _frames(avatar))
            if stored is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                if not self._write(key, avatar):
                    return False
            else:
                stored.close()
            self._mark_used(key)
        except OSError:
            return False
        return True

    # -- memory --

    def _remember(self, key: str, avatar: Avatar) -> None:
        """Keep the avatar in memory as the one used last."""
        held, _ = self._recent.get(key, (-1, b""))
        if held < _frames(avatar) and avatar.size <= self.memory:
            avatar.write(blob := BytesIO(), key)
            self._recent[key] = _frames(avatar), blob.getvalue()
        if key in self._recent:
            self._recent.move_to_end(key)
        while sum(len(blob) for _, blob in self._recent.values()) > self.memory:
            self._recent.popitem(last=False)

    # -- files --

    def _files(self, key: str = "") -> Iterator[Stored]:
        """The folder's avatars, or those of one key. Stale files of workers that died in writing are removed by the way."""
        with contextlib.suppress(OSError):
            for path in () if self.folder is None else list(self.folder.iterdir()):
                with contextlib.suppress(OSError):
                    if path.suffix == SUFFIX and path.name.startswith(key):
                        yield Stored((stat := path.stat()).st_mtime_ns, stat.st_size, path)
                    elif path.suffix == ".part" and time.time() - path.stat().st_mtime > STALE_SEC:
                        path.unlink()

    def _read(self, key: str, frames: int) -> Avatar | None:
        """The avatar with the most frames that a sound file of the key holds, at least `frames`."""
        found = sorted(((_named(file.path), file.path) for file in self._files(f"{key}-")), reverse=True)
        return next((avatar for have, path in found if have >= frames and (avatar := Avatar.open(path, key))), None)

    def _mark_used(self, key: str) -> None:
        now = time.time_ns()  # the file system's own clock is coarser
        for file in self._files(f"{key}-"):
            with contextlib.suppress(OSError):
                os.utime(file.path, ns=(now, now))

    def _write(self, key: str, avatar: Avatar) -> bool:
        """Write the avatar into the folder; False where it does not fit. May raise OSError.

        What was used least recently makes room: within the limit, and on a disk that is full.
        """
        assert self.folder is not None
        frames, size = _frames(avatar), avatar.file_size(key)
        target = self.folder / f"{key}-{'whole' if frames == WHOLE else frames}{SUFFIX}"
        files = sorted(self._files(), key=lambda file: (not file.path.name.startswith(f"{key}-"), file.used))  # its own first
        total = sum(file.size for file in files)
        if size > min(self.limit, total + shutil.disk_usage(self.folder).free):
            return False
        while True:
            try:
                if total + size <= self.limit:
                    avatar.save(target, key)
                    break
            except OSError as e:
                if e.errno not in DISK_FULL or not files:
                    raise
            total -= files[0].size
            files.pop(0).path.unlink(missing_ok=True)
        for file in files:
            if file.path.name.startswith(f"{key}-") and file.path != target:  # fewer frames, or damaged
                file.path.unlink(missing_ok=True)
        return True


def _frames(avatar: Avatar) -> int:
    """For how many frames of its clip an avatar answers."""
    return WHOLE if avatar.complete else len(avatar)


def _named(path: Path) -> int:
    """For how many frames the avatar in a file of the cache answers; none where the name is not one of ours."""
    frames = path.stem.rpartition("-")[2]
    return WHOLE if frames == "whole" else int(frames) if frames.isdecimal() else -1


def cache_key(*parts: object) -> str:
    """sha256 of the parts' JSON: content hash, parameters, weights' identity."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True, default=str).encode()).hexdigest()
