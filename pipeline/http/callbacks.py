"""Answers that are POSTed to the address a request names: signed, three tries, then a line in the log."""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import math
import threading
import time
from collections.abc import Callable
from typing import Any

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from pipeline.errors import BadRequest, Busy, JobError
from pipeline.job import redact
from pipeline.job.control import Control
from pipeline.settings import Settings
from pipeline.transfer.addresses import Addresses, BadAddress
from pipeline.transfer.send import SendFailed, send

log = logging.getLogger("musetalk.callbacks")

FIELD, SIGNATURE = "callback_url", "Musetalk-Signature"
TRIES, TRY_SEC = 3, 15.0
WAITS = wait_exponential(multiplier=5, exp_base=5)  # 5 s, then 25 s
LONGEST = 8192  # characters of a URL
MOST = 64  # that are under way; a job that wants another is refused until one has ended
Tell = Callable[[dict[str, Any]], None]
END_SEC = 3.0  # for a delivery to end once it is told to


def signature(key: str, body: bytes, seconds: int) -> str:
    """`t=`, the time of sending, and `v1=`, HMAC-SHA256 over that time, a full stop and the body."""
    digest = hmac.new(key.encode(), f"{seconds}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={seconds},v1={digest}"


class Callbacks:
    """The deliveries under way, a thread each."""

    def __init__(self, settings: Settings) -> None:
        self.key, self.addresses = settings.callback_key, Addresses(settings)
        self._under_way: dict[threading.Thread, Control] = {}

    @property
    def pending(self) -> int:
        """How many answers are not delivered yet."""
        return sum(thread.is_alive() for thread in list(self._under_way))

    def taken_from(self, job_input: Any) -> Tell:
        """What tells a job's body to its callback, whose address is taken out of the request; without one it tells nobody.

        Raises BadRequest, and Busy while too many are under way.
        """
        url = job_input.pop(FIELD, None) if isinstance(job_input, dict) else None
        if url is None:
            return self.nobody
        if not isinstance(url, str) or len(url) > LONGEST:
            raise _refused(f"must be a URL of at most {LONGEST} characters")
        if self.key is None:
            raise _refused("this worker signs no callbacks, since its CALLBACK_KEY is not set; leave it out")
        try:
            self.addresses.check_target(url.strip())
        except BadAddress as e:
            raise _refused(str(e)) from e
        if self.pending >= MOST:
            raise Busy("too many callbacks are under way; come back later", stage="unknown", limit=MOST,
                       retry_after_seconds=int(TRY_SEC))
        return lambda body: self._post(url.strip(), body)

    def nobody(self, body: dict[str, Any]) -> None:
        """Tell nobody."""

    def _post(self, url: str, body: dict[str, Any]) -> None:
        """Begin to deliver a body."""
        control = Control(math.inf)
        data = json.dumps(body, allow_nan=False).encode()
        thread = threading.Thread(target=self._deliver, args=(url, data, control), name="callback", daemon=True)
        self._under_way = {t: c for t, c in self._under_way.items() if t.is_alive()} | {thread: control}
        thread.start()

    def _deliver(self, url: str, data: bytes, control: Control) -> None:
        tries = Retrying(stop=stop_after_attempt(TRIES), wait=WAITS, sleep=control.sleep, reraise=True,
                         retry=retry_if_exception_type((SendFailed, TimeoutError)))
        with redact.job():
            redact.hide_in_job(url)
            try:
                tries(self._try, url, data, control)
            except (SendFailed, TimeoutError, JobError) as e:
                log.error("callback not delivered", extra={"url": redact.url(url), "reason": redact.text(str(e))})

    def _try(self, url: str, data: bytes, control: Control) -> None:
        assert self.key
        headers = {"Content-Type": "application/json", SIGNATURE: signature(self.key, data, int(time.time()))}
        send("POST", url, data, headers, self.addresses, control, TRY_SEC)

    def close(self, seconds: float) -> None:
        """Wait so long for what is under way, and end the rest."""
        ends = time.monotonic() + seconds
        for thread in self._under_way:
            thread.join(max(0.0, ends - time.monotonic()))
        for control in self._under_way.values():
            control.cancel()
        for thread in self._under_way:
            thread.join(END_SEC)


def _refused(message: str) -> BadRequest:
    return BadRequest(f"{FIELD}: {message}", stage="validation", field=FIELD)
