"""Work in parts: the same results, the caller's context in every thread, and torch's thread numbers left alone."""

from __future__ import annotations

import threading
from contextvars import ContextVar

import pytest
import torch
import torch.nn.functional as F

from musetalk.nets import layers
from musetalk.pixels import threads as parts
from musetalk.pixels.colour import Colour, Planes, to_rgb
from musetalk.pixels.threads import in_parts

CPU = torch.device("cpu")
SAID: ContextVar[str] = ContextVar("said", default="nothing")


@pytest.mark.skipif(parts.threads() is None, reason="needs two cores")
def test_parts_run_at_once_in_the_callers_context() -> None:
    before, both = torch.get_num_threads(), threading.Barrier(2)
    SAID.set("hello")

    def work(part: slice) -> tuple[slice, str, bool, int]:
        both.wait(10)
        return part, SAID.get(), torch.is_inference_mode_enabled(), torch.get_num_threads()

    with torch.inference_mode():
        made = in_parts(work, 2, CPU)
    assert [m[0] for m in made] == [slice(0, 1), slice(1, 2)]
    assert {m[1:3] for m in made} == {("hello", True)}
    assert all(m[3] < before for m in made), "the cores are shared"
    assert torch.get_num_threads() == before
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [before], "threads that start later have all cores"


def test_every_part_has_ended_when_one_has_failed() -> None:
    ended = []

    def work(part: slice) -> None:
        ended.append(part)
        if part.start == 0:
            raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        in_parts(work, 5, CPU)
    assert sum(part.stop - part.start for part in ended) == 5


def test_on_a_gpu_all_is_one_part() -> None:
    assert in_parts(lambda part: (part, threading.current_thread()), 5, torch.device("cuda")) == [
        (slice(0, 5), threading.current_thread())]


@pytest.mark.parametrize("colour", [Colour(), Colour("bt601", full_range=True)])
def test_stripes_are_the_whole_picture_bit_for_bit(monkeypatch: pytest.MonkeyPatch, colour: Colour) -> None:
    planes = Planes.of(torch.randint(0, 256, (322 * 242 * 3 // 2,), dtype=torch.uint8), 322, 242)
    striped = to_rgb(planes, colour)
    monkeypatch.setattr(parts, "threads", lambda: None)
    monkeypatch.setattr("musetalk.pixels.colour.STRIPE", 1000)
    assert torch.equal(to_rgb(planes, colour), striped)


@pytest.mark.parametrize("room", [1, 5, 100])  # heads at once
def test_heads_one_after_the_other_are_all_of_them(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 48, 32, generator=random).bfloat16() for _ in range(3))
    monkeypatch.setitem(layers.MAP_BYTES, "cpu", 100 * 48 * 48 * 2)
    at_once = layers.attend(q, k, v, 4)
    monkeypatch.setitem(layers.MAP_BYTES, "cpu", room * 48 * 48 * 2)
    assert torch.equal(layers.attend(q, k, v, 4), at_once)
    heads = [x.float().view(2, 48, 4, 8).transpose(1, 2) for x in (q, k, v)]
    exact = F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(2, 48, 32)
    assert float((at_once.float() - exact).abs().max()) < 0.03
