"""Mutated files, by the hundred: success or the sender's fault, and the worker goes on."""

from __future__ import annotations

import queue
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from musetalk.steps.blending import one_thread
from pipeline.run import Service
from tests.faults.files import X264, clean, make, phone_heic, write
from tests.faults.world import Row, World

CONTAINERS = {
    "mp4": X264, "mov": X264, "mkv": X264, "webm": ("-c:v", "libvpx", "-deadline", "realtime"), "avi": ("-c:v", "mpeg4"),
    "ts": X264, "png": ("-frames:v", "1"), "jpg": ("-frames:v", "1"), "webp": ("-frames:v", "1", "-c:v", "libwebp"),
    "wav": (), "mp3": (), "m4a": ("-c:a", "aac"), "flac": (), "ogg": ("-c:a", "libvorbis"), "aac": (),
    "opus": ("-c:a", "libopus"), "gif": (), "bmp": ("-frames:v", "1"), "tiff": ("-frames:v", "1"), "flv": (), "wmv": (),
    "mpg": (), "amr": ("-ar", "8000", "-ac", "1"), "aiff": (), "caf": (), "wma": (),
    "avif": ("-frames:v", "1", "-cpu-used", "8"),
}
SOUND = ("wav", "mp3", "m4a", "flac", "ogg", "aac", "opus", "amr", "aiff", "caf", "wma")


def mutate(data: bytes, r: random.Random) -> bytes:
    """One to four wounds: flipped bits, overwritten, removed, repeated or swapped pieces, extreme lengths; or a cut."""
    out = bytearray(data)
    for _ in range(r.randint(1, 4)):
        at, size = r.randrange(len(out)), r.choice((1, 4, 16, 64, 512))
        if r.random() < 0.5:
            at = r.randrange(min(len(out), 600))  # headers are worth more
        kind = r.randrange(7)
        if kind == 0:
            out[at] ^= 1 << r.randrange(8)
        elif kind == 1:
            out[at : at + size] = r.randbytes(size)
        elif kind == 2:
            del out[at : at + size]
        elif kind == 3:
            out[at:at] = out[at : at + size]
        elif kind == 4:
            other = r.randrange(len(out))
            out[at : at + size], out[other : other + size] = out[other : other + size], out[at : at + size]
        elif kind == 5:
            out[at : at + 4] = r.choice((b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\x80\0\0\0"))
        else:
            del out[max(16, at) :]
        if len(out) < 16:
            break
    return bytes(out)


def fuzz(count: int) -> Callable[[World], None]:
    """`count` mutated files over all containers: success or the sender's fault, every time, two jobs at once."""
    def one(w: World, services: queue.SimpleQueue[Service], seed: int, seeds: dict[str, bytes]) -> str:
        r = random.Random(seed)
        kind = list(seeds)[seed % len(seeds)]
        name = f"fuzz{seed}.{kind}"
        write(w, name, mutate(seeds[kind], r))
        changes = {"audio": name} if kind in SOUND else {"video": name, "audio": "word.wav"}
        service = services.get()
        body = w.job(service, job_id=f"fuzz-{seed}", **changes)
        services.put(service)
        (w.files / name).unlink()
        try:
            clean(body)
        except AssertionError as e:
            return f"seed {seed} ({kind}): {e}"
        return ""

    def act(w: World) -> None:
        seeds = {"heic": phone_heic(w)}
        make(w, "word.wav", "-i", "{speech}", "-t", "0.08")
        for kind, codec in CONTAINERS.items():
            source = ("-i", "{speech}") if kind in SOUND else ("-i", "{clip}", "-vf", "scale=160:90")
            seeds[kind] = (w.files / make(w, f"seed.{kind}", *source, *codec)).read_bytes()
        services: queue.SimpleQueue[Service] = queue.SimpleQueue()
        for _ in range(2):
            services.put(w.another())
        with ThreadPoolExecutor(2) as pool, one_thread():
            wrong = [e for e in pool.map(lambda seed: one(w, services, seed, seeds), range(count)) if e]
        assert not wrong, f"{len(wrong)} of {count}: {wrong[0]}"
    return act


ROWS = [
    Row("files", "500 mutated files", fuzz(500), limit_sec=500, brief=True),
    Row("files", "2,000 mutated files", fuzz(2000), limit_sec=1800, long=True),
]
