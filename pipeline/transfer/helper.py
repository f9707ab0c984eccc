"""Work that must be ended at once, whatever it waits for: it runs in a child process, which can always be killed.

Why a process and not a thread: resolving a name, connecting and a library's own waiting between tries cannot be interrupted
from another thread, so a thread that is stopped is in truth left behind, with its sockets and files. A helper is closed by
the end of its stdin, has `END_SEC` to clean up, and is killed then: no thread, descriptor or file of it is left. A start
takes about 0.3 s and 40 MB, since the child imports neither torch nor numpy; an idle helper is used again.
Secrets go through stdin, never through arguments or the environment.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
import tempfile
import threading
import weakref
from collections.abc import Iterator
from typing import IO, Any

from pipeline.ffmpeg.child import kill, spawn
from pipeline.job import redact
from pipeline.job.control import Control
from pipeline.settings import REPOSITORY, helper_environment

POLL_SEC = 0.1  # between looks whether the job has to stop
END_SEC = 1.5  # to clean up, once stdin has ended


class HelperFailed(Exception):
    """The helper answered that it failed (its `kind`), or ended without an answer (`died`)."""

    def __init__(self, kind: str, message: str, details: dict[str, Any]) -> None:
        super().__init__(message)
        self.kind, self.message, self.details = kind, message, details


class Helper:
    """A Python module that runs as a child process and answers requests, see `serve`. It ends with this object."""

    def __init__(self, module: str, memory: int | None = None) -> None:
        """`memory`: bytes of address space that it may take, where it reads strangers' files."""
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by _end()
        self._child = spawn([sys.executable, "-m", module], memory, helper_environment(), cwd=REPOSITORY,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        self.close = weakref.finalize(self, _end, self._child, self._log)

    def __enter__(self) -> Helper:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def alive(self) -> bool:
        """Whether it can take a request."""
        return self._child.poll() is None

    def call(self, request: dict[str, Any], control: Control, seconds: float) -> Any:
        """The answer's value. Raises HelperFailed; TimeoutError after `seconds`, Cancelled, DeadlineExceeded: close it then."""
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        limit, answer = Control(seconds), bytearray()
        waiter = select.poll()
        waiter.register(self._child.stdout, select.POLLIN)
        try:
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise self._died() from None
        while not answer.endswith(b"\n"):
            if waiter.poll(POLL_SEC * 1000):
                piece = self._child.stdout.read(1 << 16)
                if not piece:
                    raise self._died()
                answer += piece
            control.check()
            if not limit.remaining:
                raise TimeoutError(f"no answer within {seconds:.0f} s")
        result = json.loads(answer)
        if "failed" in result:
            raise HelperFailed(result["failed"], redact.text(result["message"]), result["details"])
        return result["value"]

    def _died(self) -> HelperFailed:
        kill(self._child)
        self._log.seek(0)
        complaint = redact.text(self._log.read()[-2000:].decode(errors="replace")).strip().rpartition("\n")[2]
        return HelperFailed("died", f"a helper process ended with {self._child.returncode}: {complaint[:200]}", {})


class Helpers:
    """Helpers of one module for the worker's life: as many as calls overlap, started when needed, used again."""

    def __init__(self, module: str) -> None:
        self.module = module
        self._idle: list[Helper] = []
        self._lock = threading.Lock()

    def call(self, request: dict[str, Any], control: Control, seconds: float) -> Any:
        """As `Helper.call`; a helper that did not answer is ended."""
        with self._borrowed() as helper:
            return helper.call(request, control, seconds)

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[Helper]:
        with self._lock:
            helper = self._idle.pop() if self._idle else Helper(self.module)
        if not helper.alive:  # killed while it was idle
            helper.close()
            helper = Helper(self.module)
        try:
            yield helper
        except BaseException as e:
            if not isinstance(e, HelperFailed) or e.kind == "died":
                helper.close()
                raise
            self._give_back(helper)
            raise
        self._give_back(helper)

    def close(self) -> None:
        """End those that are idle."""
        with self._lock:
            idle, self._idle = self._idle, []
        for helper in idle:
            helper.close()

    def _give_back(self, helper: Helper) -> None:
        with self._lock:
            self._idle.append(helper)


def _end(child: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    """Let it clean up, then end it."""
    if child.stdin is not None:
        with contextlib.suppress(OSError):
            child.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(END_SEC)
    kill(child)
    log.close()
