"""The child's side of a helper: requests come in at stdin, one JSON object a line, and answers go out at stdout.

Light to import: whatever a helper's module imports is waited for each time one is started.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


class Failed(Exception):
    """What a helper could not do: `kind` tells the parent what to make of it, `details` are JSON-safe."""

    def __init__(self, kind: str, message: str, **details: Any) -> None:
        super().__init__(message)
        self.kind, self.message, self.details = kind, message, details


def serve(work: Callable[[dict[str, Any]], Any], at_end: Callable[[], None] | None = None) -> None:
    """Answer requests with what `work` returns or raises, until stdin ends: the parent closed it, or is gone.

    The end of stdin ends a request under way. `at_end` then cleans up, in the little time that the parent gives.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    requests: SimpleQueue[bytes] = SimpleQueue()
    if at_end is not None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # raises SystemExit in the main thread, whatever it waits for
    threading.Thread(target=_read, args=(requests,), daemon=True).start()
    try:
        while True:
            answers.write(json.dumps(_answer(work, requests.get())) + "\n")
            answers.flush()
    except SystemExit:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if at_end is not None:
            at_end()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)  # without waiting for a library's threads


def _read(requests: SimpleQueue[bytes]) -> None:
    for line in sys.stdin.buffer:
        requests.put(line)
    os.kill(os.getpid(), signal.SIGTERM)


def _answer(work: Callable[[dict[str, Any]], Any], request: bytes) -> dict[str, Any]:
    try:
        return {"value": work(json.loads(request))}
    except Failed as e:
        return {"failed": e.kind, "message": e.message, "details": e.details}
    except Exception as e:
        traceback.print_exc()
        return {"failed": "unexpected", "message": f"{type(e).__name__}: {e}"[:500], "details": {}}
