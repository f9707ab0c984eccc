"""Synthetic speech with a viseme track: espeak-ng speaks, its phoneme events drive the mouth.

A build-time tool: it takes libespeak-ng (GPL-3) from the package espeakng-loader through ctypes and is never imported by the
worker. The audio it makes is free to use.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from training import common
from training.presenter import Mouth

RATE = 16_000  # Hz, what the networks hear
TRACK_RATE = 200  # Hz, resolution of the viseme track
VOICES = ("en-us", "en", "en-us+f2", "en+m3", "de", "de+f3", "es", "es+m4", "fr+f1", "it", "en-us+m7", "es+f4")
MORE_VOICES = (  # spoken after the others, so that those stay as they are
    "en-us+f1", "en-us+f3", "en-us+m1", "en-us+m2", "en-us+m4", "en-us+m5", "en-us+m6", "en+f1", "en+f3", "en+f4", "en+m2",
    "en+m8", "de", "de+m2", "de+f4", "de+m5", "es+f1", "es+f2", "es+m2", "it+f2", "it+m5", "it+f3", "fr", "fr+m3", "fr+f4",
    "en-gb-scotland", "en-gb-scotland+m3", "en-gb-scotland+f1", "en-us+croak", "en+whisper", "en-us+f4", "en+m7")
TRAINED_VOICES_HELD_OUT_SENTENCES = ("en-us", "en+m3", "de", "es", "it")
NEW_VOICE = "en-gb-scotland+f5"  # never trained on

# viseme -> opening 0..1, width -1..1, teeth 0..1, tongue 0..1
VISEMES: dict[str, tuple[float, float, float, float]] = {
    "sil": (0.0, 0.0, 0.0, 0.0), "PP": (0.0, -0.05, 0.0, 0.0), "FF": (0.12, 0.1, 1.0, 0.0),
    "TH": (0.26, 0.1, 0.6, 1.0), "DD": (0.28, 0.15, 0.7, 0.6), "KK": (0.34, 0.1, 0.4, 0.2),
    "CH": (0.26, -0.45, 0.9, 0.0), "SS": (0.17, 0.35, 1.0, 0.0), "RR": (0.3, -0.2, 0.4, 0.3),
    "AA": (1.0, 0.1, 0.5, 0.3), "EE": (0.62, 0.45, 0.7, 0.3), "II": (0.36, 0.7, 0.8, 0.2),
    "OO": (0.66, -0.5, 0.2, 0.1), "UU": (0.3, -0.85, 0.1, 0.0),
}
NAMES = list(VISEMES)
TABLE = np.array(list(VISEMES.values()), np.float64)
# first characters of espeak's phoneme mnemonics; longer keys are tried first
PHONEMES = {
    "tS": "CH", "dZ": "CH", "aI": "AA II", "aU": "AA UU", "eI": "EE II", "oU": "OO UU", "OI": "OO II", "I@": "II EE",
    "e@": "EE EE", "U@": "UU EE", "ts": "SS", "pf": "FF", "ai": "AA II", "au": "AA UU", "ei": "EE II", "OY": "OO II",
    "oI": "OO II",
    "p": "PP", "b": "PP", "m": "PP", "f": "FF", "v": "FF", "T": "TH", "D": "TH", "t": "DD", "d": "DD", "n": "DD",
    "l": "DD", "k": "KK", "g": "KK", "N": "KK", "h": "KK", "x": "KK", "X": "KK", "Q": "KK", "C": "CH", "S": "CH",
    "Z": "CH", "s": "SS", "z": "SS", "r": "RR", "R": "RR", "*": "DD", "j": "II", "w": "UU", "a": "AA", "A": "AA",
    "V": "AA", "E": "EE", "e": "EE", "3": "EE", "@": "EE", "I": "II", "i": "II", "y": "UU", "Y": "UU", "O": "OO",
    "o": "OO", "0": "OO", "U": "UU", "u": "UU", "B": "FF", "J": "II", ";": "II", "W": "OO",
}

SENTENCES = {
    "en": [
        "Good morning, and welcome to the programme.", "We have a lot to talk about today.",
        "Please bring the blue book from my bag.", "Maybe the weather will improve by the evening.",
        "The museum opens at nine, and the first tour begins at ten.", "How are you feeling after such a long journey?",
        "Seven small ships sailed slowly past the shore.", "Every morning my mother bakes bread and makes coffee.",
        "The quick brown fox jumps over the lazy dog.", "You should never put all your eggs in one basket.",
        "Our new model answers questions in five languages.", "Pack my box with five dozen jugs of liquid honey.",
        "I thought about it all through the night.", "Bob and Pam moved a big piano up the path.",
        "Thank you for watching, and see you again tomorrow.", "Open the window, the room is far too warm.",
        "They found fresh fish and vegetables at the market.", "She sells sea shells by the sea shore.",
        "Would you like a cup of tea, or do you prefer water?", "A group of people gathered in front of the building.",
        "Let me show you how this machine works.", "Numbers matter: one, two, three, four, five, six.",
        "The price of oil rose by two percent on Friday.", "My brother bought a boat and painted it purple.",
        "Far away, beyond the hills, a bell was ringing.", "Who would have thought that it could be so simple?",
    ],
    "de": [
        "Guten Morgen und herzlich willkommen.", "Bitte bringen Sie mir das blaue Buch.",
        "Der Zug fährt um neun Uhr von Bahnsteig fünf ab.", "Wir haben heute viele Themen zu besprechen.",
        "Meine Mutter backt jeden Morgen frisches Brot.", "Das Wetter bleibt bis zum Abend freundlich.",
        "Können Sie mir bitte sagen, wie spät es ist?", "Am Bahnhof trafen sich viele bunte Musikgruppen.",
        "Vielen Dank für Ihre Aufmerksamkeit.", "Zwei Boote liegen am Ufer unter den Bäumen.",
    ],
    "es": [
        "Buenos días y bienvenidos al programa.", "Hoy vamos a hablar de muchas cosas importantes.",
        "Mi madre prepara pan y café por la mañana.", "El museo abre a las nueve y cierra a las seis.",
        "Por favor, abre la ventana de la habitación.", "Muchas gracias por su amable atención.",
        "El barco pequeño sube por el río poco a poco.", "Nunca pongas todos los huevos en la misma cesta.",
    ],
    "fr": [
        "Bonjour et bienvenue dans notre émission.", "Nous avons beaucoup de choses à vous dire.",
        "Ma mère prépare du pain et du café le matin.", "Le musée ouvre à neuf heures et demie.",
        "Pouvez vous fermer la porte, s'il vous plaît?", "Un petit bateau passe sous le pont.",
    ],
    "it": [
        "Buongiorno e benvenuti al nostro programma.", "Oggi parliamo di molte cose importanti.",
        "Mia madre prepara il pane ogni mattina.", "Il museo apre alle nove e chiude alle sei.",
        "Per favore, apri la finestra della camera.", "Molte grazie per la vostra attenzione.",
    ],
}
HELD_OUT = {  # never trained on
    "en": [
        "Hello, I am a presenter who lives inside a computer.",
        "Each word I speak was heard first, and then painted, picture by picture.",
        "Peter made a promise to bring both maps home before supper.",
        "Above the village a warm wind moved the poplar trees.",
        "Remember to save the paper before the power fails.",
    ],
    "de": ["Am Nachmittag spielen wir im Park mit einem bunten Ball.", "Bitte machen Sie die Bühne bereit.",
           "Mein Bruder möchte morgen nach Hamburg fahren.", "Papa kauft im Laden Milch, Brot und Butter.",
           "Über dem Tal ziehen langsam Wolken vorbei."],
    "es": ["Mañana por la tarde vamos a pasear por el parque.", "Pablo compró un mapa y una bolsa de papel.",
           "La bomba de agua funciona muy bien.", "Mi hermano vive cerca de la playa.",
           "Nadie sabe quién pintó este cuadro."],
    "it": ["Domani pomeriggio andiamo a passeggiare nel parco.", "Paolo ha comprato una mappa e una borsa.",
           "Mio fratello abita vicino al mare.", "La pompa dell'acqua funziona molto bene.",
           "Nessuno sa chi ha dipinto questo quadro."],
}


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int), ("unique_identifier", ctypes.c_uint), ("text_position", ctypes.c_int),
        ("length", ctypes.c_int), ("audio_position", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("id", ctypes.c_char * 8),
    ]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass(frozen=True)
class Phoneme:
    """A phoneme's mnemonic and its time, seconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Utterance:
    """16 kHz mono float32 speech, its phonemes and its viseme track (T, 4) at TRACK_RATE."""

    pcm: NDArray[np.float32]
    phonemes: tuple[Phoneme, ...]
    track: NDArray[np.float64]

    @property
    def seconds(self) -> float:
        return len(self.pcm) / RATE

    def mouth(self, t: float) -> Mouth:
        """The mouth at second t."""
        return Mouth(*(float(v) for v in sample(self.track, t)))


def sample(track: NDArray[np.float64], t: float) -> NDArray[np.float64]:
    """The track at second t, interpolated."""
    at = min(max(t * TRACK_RATE, 0.0), len(track) - 1.0)
    low = int(at)
    high = min(low + 1, len(track) - 1)
    return track[low] + (at - low) * (track[high] - track[low])


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    loader = importlib.import_module("espeakng_loader")  # a development dependency, here alone
    lib = ctypes.CDLL(loader.get_library_path())
    if lib.espeak_Initialize(2, 200, loader.get_data_path().encode(), 1) <= 0:  # synchronous, with phoneme events
        raise RuntimeError("espeak-ng could not be initialised")
    lib.espeak_ng_SetRandSeed(1)  # it is the time, else: whispers and breath would be other samples in each process
    return lib


def synthesize(text: str, voice: str, speed: int = 165, pitch: int = 50) -> tuple[NDArray[np.float32], list[Phoneme]]:
    """Speak; returns mono float32 at 16 kHz and the phonemes with their times."""
    lib, audio, events = _library(), [], []

    def receive(wave, count, event) -> int:  # type: ignore[no-untyped-def]
        if wave and count > 0:
            audio.append(np.ctypeslib.as_array(wave, (count,)).copy())
        i = 0
        while event[i].type:
            if event[i].type == 7:
                events.append((event[i].id.decode(errors="replace"), event[i].sample))
            i += 1
        return 0

    keep = _CALLBACK(receive)
    lib.espeak_SetSynthCallback(keep)
    if lib.espeak_SetVoiceByName(voice.encode()):
        raise RuntimeError(f"espeak-ng has no voice {voice!r}")
    lib.espeak_SetParameter(1, speed, 0)
    lib.espeak_SetParameter(3, pitch, 0)
    data = text.encode() + b"\0"
    lib.espeak_Synth(data, len(data), 0, 0, 0, 1, None, None)
    lib.espeak_Synchronize()
    wave = np.concatenate(audio).astype(np.float32) / 32768
    times = [(name, at / 22050) for name, at in events] + [("", len(wave) / 22050)]
    phonemes = [Phoneme(n, a, b) for (n, a), (_, b) in itertools.pairwise(times) if b > a]
    return resample(wave, 22050, RATE), phonemes


def resample(wave: NDArray[Any], old: int, new: int) -> NDArray[np.float32]:
    """Windowed-sinc resampling through the Fourier domain."""
    count = int(np.ceil(len(wave) * new / old))
    spectrum = np.fft.rfft(wave)
    keep = np.zeros(count // 2 + 1, complex)
    n = min(len(spectrum), len(keep))
    keep[:n] = spectrum[:n]
    return (np.fft.irfft(keep, count) * (count / len(wave))).astype(np.float32)


def visemes_of(name: str) -> list[str]:
    """Visemes of an espeak mnemonic, in order; pauses (names starting with _) are silence."""
    name = name.lstrip("',")  # stress, which espeak-ng 1.52 writes before the vowel
    if not name or name[0] in "_|:%'":
        return ["sil"]
    for length in (2, 1):
        if name[:length] in PHONEMES:
            return PHONEMES[name[:length]].split()
    return ["EE"] if name[0].isalpha() else ["DD"]


def viseme_track(phonemes: list[Phoneme], seconds: float) -> NDArray[np.float64]:
    """Phonemes -> (T, 4) mouth shapes: smoothed targets (coarticulation) with full closure at p, b, m."""
    count = int(np.ceil(seconds * TRACK_RATE)) + 1
    target = np.zeros((count, 4))
    closed = np.zeros(count)
    for p in phonemes:
        names = visemes_of(p.name)
        bounds = np.linspace(p.start, p.end, len(names) + 1)
        for name, a, b in zip(names, bounds, bounds[1:]):
            target[round(a * TRACK_RATE) : round(b * TRACK_RATE)] = TABLE[NAMES.index(name)]
        if names == ["PP"]:
            centre, half = (p.start + p.end) / 2, max((p.end - p.start) / 2, 0.03)
            closed[max(0, round((centre - half) * TRACK_RATE)) : round((centre + half) * TRACK_RATE)] = 1
    smooth, gate = _gauss(target, 0.032), np.clip(_gauss(closed[:, None], 0.012) * 1.15, 0, 1)
    smooth = smooth * (1 - gate) + TABLE[NAMES.index("PP")] * gate
    smooth[:, 0] = np.clip(smooth[:, 0] - 0.02, 0, None) / 0.98  # fully closed lips stay closed
    return smooth


def _gauss(values: NDArray[np.float64], sigma: float) -> NDArray[np.float64]:
    radius = int(4 * sigma * TRACK_RATE)
    kernel = np.exp(-0.5 * (np.arange(-radius, radius + 1) / (sigma * TRACK_RATE)) ** 2)
    padded = np.pad(values, ((radius, radius), (0, 0)), mode="edge")
    return np.stack([np.convolve(c, kernel / kernel.sum(), mode="valid") for c in padded.T], axis=1)


def utter(sentences: list[str], voice: str, speed: int = 165, pitch: int = 50, gap: float = 0.45) -> Utterance:
    """Several sentences with `gap` seconds of silence around each."""
    silence = np.zeros(round(gap * RATE), np.float32)
    waves, phonemes, at = [silence], [], gap
    for text in sentences:
        wave, spoken = synthesize(text, voice, speed, pitch)
        phonemes += [Phoneme(p.name, p.start + at, p.end + at) for p in spoken]
        waves += [wave, silence]
        at += (len(wave) + len(silence)) / RATE
    pcm = np.concatenate(waves)
    return Utterance(pcm, tuple(phonemes), viseme_track(phonemes, len(pcm) / RATE))


def training_set() -> list[Utterance]:
    """The training speech, as `python -m training.speech` spoke it into the work folder."""
    path = common.WORK / "speech.npz"
    if not path.exists():
        raise SystemExit("training.speech must run first")
    with np.load(path) as file:
        return [Utterance(file[f"p{i}"], (), file[f"t{i}"]) for i in range(len(file.files) // 2)]


def speak_training_set(voices: tuple[str, ...], seed: int = 0, pieces: int = 64) -> list[Utterance]:
    """About 30 s each: random sentences, voices, speeds, pitches and gaps, with noise and gain."""
    r, out = np.random.default_rng(seed), []
    for i in range(pieces):
        voice = voices[i % len(voices)]
        texts = SENTENCES[voice[:2]]
        speed, pitch = int(r.integers(130, 200)), int(r.integers(25, 80))
        picks = [texts[j] for j in r.integers(len(texts), size=12)]
        u = utter(picks, voice, speed, pitch, float(r.uniform(0.15, 0.7)))
        count = min(len(u.pcm), 30 * RATE)
        noise = r.normal(0, 10 ** r.uniform(-5, -2.6), count)
        pcm = np.clip(u.pcm[:count] * 10 ** r.uniform(-0.7, 0.2) + noise, -1, 1).astype(np.float32)
        out.append(Utterance(pcm, u.phonemes, u.track[: round(count / RATE * TRACK_RATE) + 1]))
    return out


def as_tensor(u: Utterance) -> torch.Tensor:
    """The speech as a tensor (S,)."""
    return torch.from_numpy(u.pcm)


def main() -> None:
    """Speak the training set in a process of its own, each group of voices in turn.

    espeak-ng carries state from one sentence to the next: only a fresh process that speaks the same sentences in the
    same order gives the same samples and times again.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pieces", type=int, default=64, help="of about 30 s, for each group of voices")
    pieces = parser.parse_args().pieces
    common.WORK.mkdir(exist_ok=True, parents=True)
    spoken = speak_training_set(VOICES, 0, pieces) + speak_training_set(MORE_VOICES, 5, pieces)
    pcm, tracks = {f"p{i}": u.pcm for i, u in enumerate(spoken)}, {f"t{i}": u.track for i, u in enumerate(spoken)}
    np.savez(common.WORK / "speech.npz", **pcm, **tracks)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
