"""Child processes: how ffmpeg is started, limited, watched and ended. Nothing else starts one.

Files come from strangers. Every child gets an environment without secrets, its own process group and, when it reads a
stranger's file, a memory limit, a container whitelist and a pixel limit; it is killed with its group when not wanted any more.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import re
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import imageio_ffmpeg

from pipeline.errors import BadMedia, FfmpegFailed
from pipeline.job import redact
from pipeline.settings import child_environment

PIPE_BYTES = 1 << 20
MEMORY_LIMIT = 6 << 30  # bytes of address space of a child that reads a stranger's file
PROBE_SEC = 20  # to describe a file
CHECK_SEC = 0.2  # how often a child that is waited for is asked after
LOG_BYTES = 8 << 10  # of a log's end from which a message is made: its size is up to a stranger's file
END_SEC = 10.0  # from the end of a child's output to its own
STARVED = re.compile(r"Cannot allocate memory|Resource temporarily unavailable|error while loading shared libraries")
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGABRT, signal.SIGTRAP}  # nobody sends them
CONSEQUENCE = re.compile(r"^( |frame=|size=|Output #|Press |Conversion failed)|^\[(([av]f|[av]ost|out)#|showinfo@)|"
                         r"Task finished with|Terminating thread|Decode error rate")
CONTEXT = re.compile(r"\[[^\s\[\]]{1,80} @ 0x[0-9a-f]+\] ")
CROWDED = "exceeds max_streams parameter"  # a file's fault, for which ffmpeg has no error number of its own but ENOMEM's


@functools.lru_cache(maxsize=1)
def ffmpeg() -> str:
    """Path of the ffmpeg to use (IMAGEIO_FFMPEG_EXE, else the packaged one)."""
    return imageio_ffmpeg.get_ffmpeg_exe()


def spawn(
    command: Sequence[str], memory: int | None, environment: Mapping[str, str] | None = None, **pipes: Any
) -> subprocess.Popen[bytes]:
    """Start a child in a process group of its own, with at most `memory` bytes of address space if given."""
    child = subprocess.Popen(list(command), env=child_environment() if environment is None else environment,
                             start_new_session=True, bufsize=0, **pipes)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if memory is not None:
            resource.prlimit(child.pid, resource.RLIMIT_AS, (memory, memory))
        resource.prlimit(child.pid, resource.RLIMIT_CORE, (0, 0))
    return child


def signal_group(child: subprocess.Popen[bytes]) -> None:
    """Kill the child's whole group; safe from any thread, closes nothing."""
    if child.returncode is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)


def kill(child: subprocess.Popen[bytes]) -> None:
    """End the child's whole group at once, collect it and close its pipes."""
    signal_group(child)
    child.wait()
    for pipe in (child.stdin, child.stdout, child.stderr):
        if pipe:
            with contextlib.suppress(OSError):
                pipe.close()


def run(
    command: Sequence[str], timeout: float, limited: bool = True, check: Callable[[], None] = lambda: None
) -> tuple[int, bytes, str]:
    """Run to the end: exit code, stdout, stderr. Raises FfmpegFailed when it hangs, is killed or lacks memory; BadMedia when
    it crashes on a stranger's file, which is what a `limited` child reads.

    `check` is called several times a second and may raise: the job was cancelled or is out of time.
    """
    ends = time.monotonic() + timeout
    child = spawn(command, MEMORY_LIMIT if limited else None, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                  stderr=subprocess.PIPE)
    try:
        while True:
            try:
                out, err = child.communicate(timeout=min(CHECK_SEC, max(0.0, ends - time.monotonic())))
                break
            except subprocess.TimeoutExpired:
                check()
                if time.monotonic() >= ends:
                    raise FfmpegFailed(f"{Path(command[0]).name} took more than {timeout:g} s",
                                       timeout_seconds=timeout) from None
        log = err.decode(errors="replace")
        check_exit(Path(command[0]).name, child.returncode, log, limited)
        return child.returncode, out, log
    finally:
        kill(child)


def check_exit(name: str, code: int, log: str, foreign: bool) -> None:
    """Raise FfmpegFailed for an end that says nothing about the file: by a signal, or for lack of memory.

    At the pipe such an end looks like the end of the file. BadMedia where a `foreign` file, a stranger's, made it crash.
    """
    if code < 0:
        name_of = {s.value: s.name for s in signal.Signals}.get(-code, f"signal {-code}")
        if foreign and -code in CRASHES:
            raise BadMedia(f"the file is damaged: {name} crashed on it ({name_of})", exit_status=code)
        raise FfmpegFailed(f"{name} was killed ({name_of})", exit_status=code)
    log = complaints(log)
    if code and STARVED.search(log) and CROWDED not in log:
        raise FfmpegFailed(f"{name} ran out of memory", exit_status=code, ffprobe_stderr=tail(log))


def complaints(text: str) -> str:
    """ffmpeg's log without the indented lines: those describe a file, in the words of whoever wrote its tags."""
    return "\n".join(line for line in text.split("\n") if not line.startswith(" "))


def tail(text: str, path: Path | None = None, limit: int = 400) -> str:
    """The end of ffmpeg's complaints, without the file's local path. Only the log's last LOG_BYTES are looked at."""
    text = text[-LOG_BYTES:]
    text = redact.text(text.replace(f"file:{path}", "input").replace(str(path), "input") if path else text)
    return text.strip()[-limit:]


def causes(log: str, path: Path) -> str:
    """What demuxers and decoders say of a file, not what the rest of ffmpeg, which lacks their frames, says of itself."""
    lines = [CONTEXT.sub("", line) for line in log[-LOG_BYTES:].split("\n") if line.strip() and not CONSEQUENCE.search(line)]
    return tail("\n".join(dict.fromkeys(lines)), path)


def about_file(log: str, path: Path) -> str:
    """What is wrong with a file that ffmpeg reads; empty when nothing is."""
    return ": ".join(filter(None, ["the file is damaged or cut off" if log.strip() else "", causes(log, path)]))


class Child:
    """An ffmpeg process that runs along, its complaints kept in a temporary file."""

    def __init__(self, command: Sequence[str], path: Path, memory: int | None, **pipes: Any) -> None:
        """`path` is the file that complaints call "input"."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._path, self._aborted = path, False
        self._child = spawn(command, memory, stderr=self._log, **pipes)
        for pipe in (self._child.stdin, self._child.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # a larger pipe: fewer wake-ups for each frame
                    fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, PIPE_BYTES)

    def log(self) -> str:
        """The end of what ffmpeg has written to its log so far."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - LOG_BYTES))
        return self._log.read().decode(errors="replace")

    def complaint(self) -> str:
        """The same without the local path of its file."""
        return tail(self.log(), self._path)

    def abort(self) -> None:
        """Make a read or write in another thread end at once."""
        self._aborted = True
        signal_group(self._child)

    def close(self) -> None:
        """End the process if it still runs."""
        kill(self._child)
        self._log.close()
