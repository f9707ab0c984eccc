"""A film's HLS rendition: stored segment by segment while the film is made, so that it can be played long before its end.

ffmpeg writes the segments and names each in its playlist once it is whole; a thread stores them: init, segment, playlist.
The stored names carry a digest of what they hold, so what a name holds never changes: a run that is repeated finds its own
segments there, and a playlist, which only ever lists one run's, is never played with another run's.
"""

from __future__ import annotations

import contextvars
import hashlib
import logging
import math
import re
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

from pipeline.errors import Cancelled, DiskFull, JobError, StorageRejected, StorageUnavailable
from pipeline.job.control import Control
from pipeline.media import PLAYLIST, SEGMENT_SEC
from pipeline.schema import StreamMetrics
from pipeline.transfer.storage import MP4, Storage

log = logging.getLogger("musetalk.stream")

POLL_SEC = 0.05  # between looks whether a segment is whole
END_SEC = 3.0  # to end the playlist of a film that is not made to its end
M3U8 = "application/vnd.apple.mpegurl"
FOR_EVER, NEVER = "public, max-age=31536000, immutable", "no-store"  # how caches may keep segments, and the playlist
SEGMENT = re.compile(r"#EXTINF:([\d.]+),\n(\S+)\n")
END = "#EXT-X-ENDLIST\n"


class Rendition:
    """What ffmpeg writes to `folder`, stored under `key`/ by a thread while the context is open.

    The film does not depend on it: a storage that does not take a segment ends the stream, and `finish` says why. Leaving the
    context before all is stored ends the stored playlist, with a remark that the film is not complete.
    """

    def __init__(self, folder: Path, storage: Storage, key: str, rate: Fraction, control: Control,
                 label: Callable[[Path], None]) -> None:
        """`rate` is the film's frame rate, `label` writes the marks into the stream's first part."""
        self.folder, self.storage, self.key, self.control, self.label = folder, storage, key, control, label
        self.header = ["#EXTM3U", "#EXT-X-VERSION:7", f"#EXT-X-TARGETDURATION:{int(SEGMENT_SEC + 0.5 + 1 / rate)}",
                       "#EXT-X-MEDIA-SEQUENCE:0", "#EXT-X-PLAYLIST-TYPE:EVENT", "#EXT-X-INDEPENDENT-SEGMENTS",
                       "#EXT-X-START:TIME-OFFSET=0,PRECISE=YES"]  # a player of a live stream would begin near its end
        self.lines: list[str] = []  # of the segments that are stored
        self.seconds, self.segments = 0.0, 0  # of them
        self.url: str | None = None
        self.first_sec: float | None = None
        self.whole, self.failed = False, ""  # why it is not
        self._error: BaseException | None = None
        self._own = Control(math.inf)  # the thread's: ends what it does when the job is over, whatever ended it
        # in a copy of the job's context, which knows the job's secrets
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._work,), name="rendition", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._own.cancel()
        self._thread.join()
        if self.whole or not self.segments:  # there is no playlist
            return
        self.failed = self.failed or ("the job was cancelled" if isinstance(error, Cancelled) else "the job failed")
        try:
            self._store_playlist(Control(END_SEC), f"# incomplete: {self.failed}\n{END}")
        except JobError as e:
            log.warning("the stream's playlist could not be ended: %s", e.message)

    def finish(self) -> StreamMetrics:
        """Wait until all is stored, or the storage has refused it. Raises Cancelled or DeadlineExceeded."""
        while self._thread.is_alive():
            self._thread.join(POLL_SEC)
            self.control.check()
        if self._error is not None:
            raise self._error
        return StreamMetrics(playlist_url=self.url, segments=self.segments, first_segment_sec=self.first_sec,
                             incomplete=self.failed or None)

    def _work(self) -> None:
        try:
            self._publish()
            self.whole = True
        except (StorageRejected, StorageUnavailable, DiskFull) as e:
            self.failed = e.message
            log.warning("the stream ends before its film: %s", e.message)
        except Cancelled:
            pass
        except BaseException as e:
            self._error = e

    def _publish(self) -> None:
        """Store each segment as soon as it is whole, until ffmpeg's playlist ends."""
        while True:
            listed, complete = _listed(self.folder / PLAYLIST)
            for number in range(self.segments, len(listed)):
                self._store_segment(*listed[number])
                if not complete or number + 1 < len(listed):
                    self._store_playlist(self._own)
            if complete:
                return self._store_playlist(self._own, END)
            self._own.sleep(POLL_SEC)

    def _store_segment(self, seconds: float, name: str) -> None:
        if not self.segments:
            self.label(self.folder / "init.mp4")
            self.header.append(f'#EXT-X-MAP:URI="{self._store(self.folder / "init.mp4", "init")}"')
        stored = self._store(self.folder / name, f"{self.segments:05}")
        self.lines += [f"#EXTINF:{seconds:.6f},", stored]
        self.segments, self.seconds = self.segments + 1, self.seconds + seconds

    def _store(self, file: Path, name: str) -> str:
        """Store a part and remove it here: its name at the storage."""
        name = f"{name}-{hashlib.sha256(file.read_bytes()).hexdigest()[:16]}{file.suffix}"
        self.storage.upload(file, f"{self.key}/{name}", self._own, content_type=MP4, cache_control=FOR_EVER)
        file.unlink()
        return name

    def _store_playlist(self, control: Control, end: str = "") -> None:
        (file := self.folder / "stored.m3u8").write_text("\n".join([*self.header, *self.lines, end]))
        self.url = self.storage.upload(file, f"{self.key}/{PLAYLIST}", control, content_type=M3U8, cache_control=NEVER)
        if self.first_sec is None:
            self.first_sec = round(time.monotonic() - self.control.arrived, 3)
        self.control.playable(self.url, self.seconds)


def _listed(playlist: Path) -> tuple[list[tuple[float, str]], bool]:
    """Seconds and name of each segment that ffmpeg has written, and whether there come no more."""
    text = playlist.read_text() if playlist.exists() else ""
    return [(float(seconds), name) for seconds, name in SEGMENT.findall(text)], END in text
