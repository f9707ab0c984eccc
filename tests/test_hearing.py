"""What the networks hear: the sides of Whisper's 30 s pieces, long speeches, quiet ones. Demo weights, mouths measured."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch

from benchmarks.sync import Clip, Ruler, correlation, source
from musetalk import LipSync, Options
from musetalk.sound.features import PIECE, SAMPLE_RATE, Prompts, whisper_states
from pipeline.run import Service
from tests.conftest import SAMPLES
from training.speech import sample

FPS = Fraction(25)
Floats = np.ndarray


@pytest.fixture(scope="module")
def lipsync(service: Service) -> LipSync:
    return service.engine.load()


@torch.inference_mode()
def test_prompts_at_the_sides_of_a_piece_are_upstream_s(lipsync: LipSync, words: Floats) -> None:
    """Each 30 s are heard alone and their steps are put side by side: none is left out, none is heard twice."""
    pcm = torch.from_numpy(np.tile(words, 6)[: PIECE + SAMPLE_RATE])
    prompts = Prompts(lipsync.nets.whisper, pcm, FPS)
    first, second = (whisper_states(lipsync.nets.whisper, part) for part in (pcm[:PIECE], pcm[PIECE:]))
    assert len(first) == 1500
    assert len(prompts) == 31 * FPS
    for frame, before, after in ((747, 10, 0), (748, 8, 2), (749, 6, 4), (750, 4, 6), (751, 2, 8), (752, 0, 10)):
        at = 2 * frame - 4
        wanted = torch.cat([first[at : at + before], second[max(0, at - 1500) : max(0, at - 1500) + after]])
        got = prompts.batch([frame])[0] - prompts.positions
        torch.testing.assert_close(got, wanted.flatten(0, 1), atol=1e-5, rtol=0, msg=f"frame {frame}")


@torch.inference_mode()
def test_every_half_minute_of_a_long_speech_is_heard_alike(lipsync: LipSync, words: Floats) -> None:
    """Frame i hears i / fps, at 89 s as at 29 s: the same 30 s three times give the same prompts three times."""
    half_minute = np.tile(words, 6)[:PIECE]
    prompts = Prompts(lipsync.nets.whisper, np.tile(half_minute, 3), FPS)
    assert len(prompts) == 90 * FPS
    inside = list(range(2, 748))  # what hears the neighbouring piece, too, is the other test's
    once, twice, thrice = (prompts.batch([i + k * 750 for i in inside]) for k in range(3))
    torch.testing.assert_close(once, twice, atol=1e-4, rtol=0)
    torch.testing.assert_close(once, thrice, atol=1e-4, rtol=0)
    assert (once[1:] - once[:-1]).abs().amax(dim=(1, 2)).min() > 1e-3, "one frame off would be seen"


@torch.inference_mode()
def test_a_sentence_is_heard_at_its_time_wherever_it_is_said(lipsync: LipSync, words: Floats) -> None:
    """Across the sides at 30 and 60 s and up to the end at 90 s: its frames' prompts are most like those of the same frames
    of the sentence said alone, not like their neighbours'."""
    alone = Prompts(lipsync.nets.whisper, words, FPS).batch(range(133)).flatten(1)
    for begin in (27.4, 57.4, 84.68):
        pcm = np.zeros(90 * SAMPLE_RATE, np.float32)
        at, first = round(begin * SAMPLE_RATE), round(begin * FPS)
        pcm[at : at + len(words)] = words[: len(pcm) - at]
        prompts = Prompts(lipsync.nets.whisper, pcm, FPS)
        assert len(prompts) == 90 * FPS
        heard = prompts.batch([first + i for i in range(10, 123)]).flatten(1)
        away = {lag: float((heard - alone[10 + lag : 123 + lag]).abs().mean()) for lag in range(-4, 5)}
        assert min(away, key=away.__getitem__) == 0, (begin, away)
        assert away[0] < 0.8 * min(away[-1], away[1]), (begin, away)


@torch.inference_mode()
def test_openness_moves_the_tokens_away_from_silence(lipsync: LipSync, words: Floats) -> None:
    """On the line from those of silence through those that are heard, which 1 keeps to the bit; a mouth at rest stays so."""
    pcm = np.concatenate([words[8000:16000], np.zeros(8000, np.float32)])
    heard = Prompts(lipsync.nets.whisper, pcm, FPS)
    same = lipsync.prompts(pcm, FPS, Options(silence="model", openness=1.0))
    assert torch.equal(same.batch(range(12)), heard.batch(range(12)))
    narrow, wide = (lipsync.prompts(pcm, FPS, Options(openness=value)) for value in (0.5, 1.5))
    speaks, rests = list(range(12)), [22, 23, 24]
    closed = narrow.silence + narrow.positions
    for asked, gain in ((narrow, 0.7), (wide, 1.08)):
        torch.testing.assert_close(asked.batch(speaks), torch.lerp(closed.expand(12, -1, -1), heard.batch(speaks), gain))
    assert narrow.resting[22:] == [1.0, 1.0, 1.0]
    assert torch.equal(narrow.batch(rests), closed.expand(3, -1, -1))
    assert torch.equal(wide.batch(rests), narrow.batch(rests))


@dataclass(frozen=True)
class Mouths:
    """A drawn face that speaks, and its measure."""

    lipsync: LipSync
    clip: Clip
    ruler: Ruler

    def openings(self, pcm: Floats, frames: range, openness: float = 1.0) -> Floats:
        """Measured openings of some frames of a speech, (N,)."""
        options = Options(quality="fast", batch_size=16, openness=openness)
        images = itertools.islice(self.lipsync.speak(self.clip.avatar, pcm, FPS, options), frames.start, frames.stop)
        return self.ruler.measure(list(images), [self.clip.poses[source(i)] for i in frames])[:, 0]


@pytest.fixture(scope="module")
def mouths(lipsync: LipSync, drawn: Clip, ruler: Ruler) -> Mouths:
    return Mouths(lipsync, drawn, ruler)


@pytest.fixture(scope="module")
def truth(words: Floats) -> Floats:
    """True openings of the sample speech's frames, (133,)."""
    track = np.repeat(np.array(json.loads((SAMPLES / "speech.json").read_text())["track"]), 4, axis=0)
    return np.array([sample(track, float(i / FPS))[0] for i in range(int(len(words) * FPS / SAMPLE_RATE))])


@pytest.mark.full
def test_quiet_speech_moves_the_mouth_as_loud_speech_does(mouths: Mouths, words: Floats, truth: Floats) -> None:
    wide = None
    for db in (0, -50):
        quiet = (np.round(words / np.abs(words).max() * 10 ** (db / 20) * 32768) / 32768).astype(np.float32)
        opening = mouths.openings(quiet, range(len(truth)))
        wide = wide or opening.std()
        print(f"peaks at {db} dBFS: correlation {correlation(opening, truth):.3f}, amplitude {opening.std() / wide:.2f}")
        assert correlation(opening, truth) > 0.88
        assert opening.std() > 0.85 * wide


def test_a_mouth_opens_as_wide_as_asked(mouths: Mouths, words: Floats) -> None:
    """On average over 20 frames of speech."""
    narrow, spoken, wide = (mouths.openings(words[8000:], range(20), value).mean() for value in (0.5, 1.0, 1.5))
    assert narrow < 0.85 * spoken < spoken < 0.98 * wide


@pytest.mark.full
def test_noise_alone_moves_no_mouth(mouths: Mouths) -> None:
    noise = (np.random.default_rng(1).standard_normal(SAMPLE_RATE) * 1e-3).astype(np.float32)
    assert mouths.openings(noise, range(25)).max() < 0.1
