"""The steps over frames in memory: streamed or collected, for one speaker or several."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.live import Simulated
from musetalk import Avatar, BadAudio, BadInput, LipSync, LiveSpeaker, NoFace, Options
from musetalk.steps import FRAMES_HELD, GROUP, RGB, Frame, Speaker, State, blend, follow, frames_to_read, generate, prepare
from pipeline.ffmpeg import ffmpeg
from pipeline.run import Service

OUTPUTS = 5
OPTIONS = Options(batch_size=2)


@pytest.fixture(scope="module")
def lipsync(service: Service) -> LipSync:
    return service.engine.load()


@pytest.fixture(scope="module")
def clip(short_clip: Path) -> list[torch.Tensor]:
    """As many frames as a film of OUTPUTS frames looks at."""
    count = frames_to_read(OUTPUTS)
    command = [ffmpeg(), "-v", "error", "-i", str(short_clip), "-frames:v", str(count), "-f", "rawvideo", "-pix_fmt", "rgb24",
               "-"]
    raw = subprocess.run(command, capture_output=True, check=True).stdout
    return list(torch.from_numpy(np.frombuffer(raw, np.uint8).reshape(count, 360, 640, 3).copy()))


def pcm(seed: int) -> np.ndarray:
    noise: np.ndarray = np.random.default_rng(seed).normal(size=OUTPUTS * 640).astype(np.float32)
    return noise * 0.1


def speaker(lipsync: LipSync, seed: int, avatar: Avatar | None = None, **given: Any) -> Speaker:
    options = Options(batch_size=2, **given)
    prompts = lipsync.prompts(pcm(seed), Fraction(25), options)
    return Speaker(avatar or Avatar.new(), prompts, [1.0] * len(prompts), options)


def streamed(lipsync: LipSync, pictures: list[torch.Tensor], speakers: list[Speaker]) -> list[np.ndarray]:
    """The film's frames, by the whole chain; what is only looked at must come out, too, and is as it was."""
    state = State.of(lipsync.nets)
    frames = (Frame(i if i < OUTPUTS else None, i, p.clone(), RGB) for i, p in enumerate(pictures))
    out = list(blend(generate(prepare(frames, speakers, state), speakers, state)))
    assert [f.source for f in out] == list(range(len(pictures)))
    assert all(torch.equal(f.buffer, pictures[f.source]) for f in out[OUTPUTS:])
    return [f.buffer.numpy() for f in out[:OUTPUTS]]


def test_the_library_is_the_collected_stream(lipsync: LipSync, clip: list[torch.Tensor]) -> None:
    """The chain on a clip that goes on equals `prepare` and `speak` on all of it, bit for bit."""
    want = list(lipsync.speak(lipsync.prepare(clip, OPTIONS), pcm(1), options=OPTIONS))
    got = streamed(lipsync, clip, [speaker(lipsync, 1)])
    assert np.array_equal(np.stack(got), np.stack(want))
    assert not np.array_equal(got[0], clip[0].numpy())


def test_two_speakers_are_two_steps_of_the_same_chain(lipsync: LipSync, clip: list[torch.Tensor]) -> None:
    """Two people side by side, each with a speech of their own, in common batches: each as if they spoke alone."""
    pair = [torch.cat([picture, picture.flip(1)], dim=1) for picture in clip]
    left, right = ({"face": side} for side in ("leftmost", "rightmost"))
    both = streamed(lipsync, pair, [speaker(lipsync, 1, **left), speaker(lipsync, 2, **right)])
    alone = [streamed(lipsync, pair, [speaker(lipsync, seed, **side)]) for seed, side in ((1, left), (2, right))]
    for i in range(OUTPUTS):
        for half, own in zip((slice(0, 640), slice(640, 1280)), alone, strict=True):
            assert (both[i][:, half] != pair[i].numpy()[:, half]).any()
            apart = np.abs(both[i][:, half].astype(int) - own[i][:, half])
            assert apart.max() <= 4, "a larger batch only rounds otherwise"
            assert apart.mean() < 0.02


def test_no_face_is_said_of_the_frames_that_are_used(lipsync: LipSync, clip: list[torch.Tensor]) -> None:
    """Where the first face comes later, whether the clip is prepared or not."""
    nobody = [torch.full_like(clip[0], 128)] * OUTPUTS + clip[: len(clip) - OUTPUTS]
    for avatar in (Avatar.new(), lipsync.prepare(nobody, OPTIONS)):
        with pytest.raises(NoFace, match=f"none of its {OUTPUTS} frames"):
            streamed(lipsync, nobody, [speaker(lipsync, 1, avatar)])


def test_preparing_holds_no_more_frames_than_it_says(lipsync: LipSync, clip: list[torch.Tensor]) -> None:
    """A film has so many buffers: with fewer it would stand still."""
    taken, most = 0, 0

    def frames() -> Iterator[Frame]:
        nonlocal taken
        for i, picture in enumerate([*clip, *clip[::-1]]):
            taken += 1
            yield Frame(i, i, picture, RGB)

    for handed_on, _ in enumerate(follow(frames(), [(Avatar.new(), OPTIONS.face)], OPTIONS, State.of(lipsync.nets))):
        most = max(most, taken - handed_on)
    assert GROUP < most <= FRAMES_HELD


@pytest.mark.parametrize(("speech", "words"), [
    (np.zeros(0, np.float32), "no samples"), (np.zeros((800, 2), np.float32), "one channel"),
    (np.zeros(800, np.int16), "int16"), (np.full(800, np.nan, np.float32), "NaN"),
], ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("finish", ["natural", "official"])
def test_what_is_no_speech_of_one_channel_is_refused(
    lipsync: LipSync, clip: list[torch.Tensor], speech: np.ndarray, words: str, finish: Any
) -> None:
    with pytest.raises(BadAudio, match=words):
        lipsync.prompts(speech, Fraction(25), Options(finish=finish))
    if len(speech):
        avatar = Avatar.new()
        avatar.frames = clip[:1]
        avatar.append(None)
        with pytest.raises(BadAudio, match=words):
            LiveSpeaker(avatar, Simulated(), Fraction(25), 0.0, 1, "pingpong").push(speech)


def test_what_is_no_picture_is_refused_and_a_mirrored_one_is_none_such(lipsync: LipSync, clip: list[torch.Tensor]) -> None:
    picture = clip[0].numpy()
    with_alpha = np.dstack([picture, picture[..., 0]])
    for wrong in (picture / np.float32(255), picture[..., 0], with_alpha, picture.transpose(2, 0, 1)):
        with pytest.raises(BadInput, match=r"give RGB pixels \(H, W, 3\) uint8"):
            lipsync.prepare([wrong])
    with pytest.raises(BadInput, match="several sizes"):
        lipsync.prepare([picture, picture[:100]])
    backwards = lipsync.prepare([picture[..., ::-1][..., ::-1], picture[:, ::-1]], OPTIONS)
    assert torch.equal(backwards.frames[1], clip[0].flip(1))


@pytest.mark.parametrize("fps", [0, -25, None, "25", float("nan"), float("inf")])
def test_a_rate_that_is_none_is_refused(lipsync: LipSync, fps: Any) -> None:
    with pytest.raises(BadInput, match="give frames a second"):
        lipsync.prompts(pcm(1), fps)


def test_an_avatar_without_its_clip_says_so(lipsync: LipSync) -> None:
    """As one from a cache is."""
    cached = Avatar.new()
    cached.append(None)
    with pytest.raises(BadInput, match=r"set avatar\.frames"):
        next(lipsync.speak(cached, pcm(1)))
    with pytest.raises(BadInput, match=r"set avatar\.frames"):
        LiveSpeaker(cached, Simulated(), Fraction(25), 0.0, 1, "pingpong")


@pytest.mark.parametrize(("given", "words"), [
    ({"finish": "offical"}, "finish='offical': give natural, official"), ({"openness": 9}, "openness=9: give 0.5 to 1.5"),
    ({"face": "biggest"}, "give largest, leftmost, rightmost, 0 to 99"),
    ({"batch_size": None}, "batch_size=None: give 1 to 64"), ({"seed": -1}, "seed=-1: give 0 to "),
])
def test_options_that_there_are_not_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(BadInput, match=words):
        Options(**given)
    assert Options(seed=None, face=3).face == 3
