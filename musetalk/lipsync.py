"""MuseTalk as a library: load once, prepare a face once, speak any number of times.

    lipsync = LipSync.load("models/demo")
    avatar = lipsync.prepare(frames)                     # RGB frames (H, W, 3) uint8
    for frame in lipsync.speak(avatar, pcm, fps=Fraction(25)):
        ...                                              # RGB frames, mouth moving with pcm (16 kHz mono float32)

`prepare` and `speak` hold what they are given; the streaming worker uses their parts (`prepare_stream`, `prompts`,
`generate_batch`) over bounded queues instead.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from musetalk import checkpoints
from musetalk.avatar import Avatar, Face
from musetalk.draw import generate, layout
from musetalk.draw import recorded as tuning
from musetalk.draw.interruption import check
from musetalk.errors import NoFace, NoFastLane, NonFiniteOutput
from musetalk.face import crops
from musetalk.face.steady import Found, steadied
from musetalk.face.track import Tracker
from musetalk.geometry.box import Box, Region
from musetalk.geometry.place import Place
from musetalk.options import Finish, Options
from musetalk.order import source_index
from musetalk.pixels.threads import in_parts
from musetalk.show import blend
from musetalk.show.finish import lips_map, natural
from musetalk.sound.features import Prompts, silent_frames

log = logging.getLogger("musetalk.lipsync")


@dataclass
class LipSync:
    """The loaded networks and the steps between them."""

    nets: checkpoints.Networks
    largest_batch: int = field(default=1 << 30)  # halved for good when memory ran out

    def __post_init__(self) -> None:
        if self.nets.device.type == "cpu":  # where one pass can take half a minute; a GPU's launches are over at once
            for module in self.nets.modules():
                module.register_forward_pre_hook(check)
        self.generator: tuning.Generator = tuning.plain(self.nets.unet, self.nets.vae)
        self.fast: tuning.Generator | None = None  # of the rows that `lower` decodes
        if self.nets.tiny is not None:
            self.lower = generate.Lower(self.nets.tiny, self.nets.vae.cfg)
            self.fast = tuning.plain(self.nets.unet, self.lower)

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> LipSync:
        """Load the weights in `folder` (official or converted layout); raises BadCheckpoint.

        On a GPU this fixes, for the process, what chooses kernels: see `tuning.fix_numerics`.
        """
        if torch.device(device).type == "cuda":
            tuning.fix_numerics()
        nets = checkpoints.load(folder, device, dtype)
        if nets.device.type == "cpu":
            layout.fit_cpu(nets.unet, nets.vae, nets.tiny)
        return cls(nets)

    @property
    def crop_size(self) -> int:
        """Side of the face crops the networks work on, pixels."""
        return self.nets.vae.cfg.crop_size

    @torch.inference_mode()
    def tune(self, batch_size: int, tokens: int) -> None:
        """On a GPU, record the generator for batches of up to `batch_size` faces of `tokens` audio tokens each."""
        if self.nets.device.type == "cuda":
            unet, vae = self.nets.unet, self.nets.vae
            inputs = tuning.examples(unet, vae, batch_size, tokens)
            self.generator = tuning.Recorded(tuning.plain(unet, vae), *inputs)
            if self.fast is not None:
                self.fast = tuning.Recorded(self.fast, *inputs)
            self.largest_batch = min(self.largest_batch, batch_size)

    # -- preparing -----------------------------------------------------------------------------------------------------

    def prepare(self, frames: Iterable[np.ndarray | Tensor], options: Options | None = None) -> Avatar:
        """RGB frames (H, W, 3) uint8 -> the avatar. Raises NoFace when no frame holds a usable face."""
        avatar = Avatar.new()
        avatar.frames = [torch.as_tensor(f) for f in frames]
        for _ in self.prepare_stream(avatar.frames, avatar, options or Options.for_version(self.nets.version)):
            pass
        if not avatar.faces:
            raise NoFace(f"none of the {len(avatar)} frames holds a face")
        return avatar

    def prepare_stream(self, frames: Iterable[Tensor], avatar: Avatar, options: Options) -> Iterator[int]:
        """Append every frame to `avatar`, yielding the number appended so far after each group."""
        shift = options.bbox_shift if self.nets.version == "v1" else 0
        natural = options.finish == "natural"
        tracker = Tracker(self.nets.detector, self.nets.pose, options.face, shift, natural=natural)
        group: list[tuple[Tensor, Found | None]] = []
        followed = tracker.run(frames)
        for item in steadied(followed) if natural else followed:
            group.append(item)
            if len(group) == options.batch_size:
                self.append(avatar, group, options)
                group = []
                yield len(avatar)
        self.append(avatar, group, options)
        avatar.finish()
        yield len(avatar)

    @torch.inference_mode()
    def append(self, avatar: Avatar, group: list[tuple[Tensor, Found | None]], options: Options) -> None:
        """Crop, parse and encode the faces of a few frames."""
        present = [(frame, found.place) for frame, found in group if found is not None]
        noise = self._noise(options.seed, len(avatar), len(present))
        made = in_parts(lambda part: self._faces(present[part], None if noise is None else noise[:, part], options),
                        len(present), self.nets.device)
        ready = itertools.chain.from_iterable(made)
        for _, found in group:
            avatar.append(None if found is None else next(ready))

    def _faces(self, present: list[tuple[Tensor, Place]], noise: Tensor | None, options: Options) -> list[Face]:
        """The entries of frames with the places of their faces; `noise` (2, N, 4, h, w)."""
        if not present:
            return []
        device = self.nets.device
        places = [place.lowered(options.extra_margin, frame.shape[0]) for frame, place in present]
        frames = [frame.to(device) for frame, _ in present]
        squares = torch.stack([crops.crop(frame, place, self.crop_size) for frame, place in zip(frames, places, strict=True)])
        latents = generate.latents(self.nets.vae, squares, None if noise is None else noise.flatten(0, 1)).half().cpu()
        upright = [blend.upright(frame, place) for frame, place in zip(frames, places, strict=True)]
        labels = blend.parse(self.nets.parser, [blend.cut(picture, blend.blend_square(box)) for picture, box in upright])
        masks = blend.label_mask(labels, options.parsing_mode, options.left_cheek_width, options.right_cheek_width)
        boxes = [box for _, box in upright]
        regions = [self._region(*each) for each in zip(masks, boxes, places, frames, strict=True)]
        lips = torch.stack([lips_map(k, blend.blend_square(b), b) for k, b in zip(labels, boxes, strict=True)]).cpu()
        return [Face(*parts) for parts in zip(places, regions, latents, lips, strict=True)]

    @staticmethod
    def _region(mask512: Tensor, box: Box, place: Place, frame: Tensor) -> Region:
        """What blending may change in a frame (H, W, 3), with its soft mask, on the CPU."""
        square = blend.blend_square(box)
        mask = blend.within(blend.soft_mask(mask512, square, box).cpu(), square, box)  # trimming it needs its values
        return blend.region_of(*blend.turned_back(mask, square, box, place), frame.shape[1], frame.shape[0])

    def _noise(self, seed: int | None, first: int, count: int) -> Tensor | None:
        """Standard normal noise (2, count, 4, h, w) for the posteriors of crops from frame `first` on; None without a seed."""
        if seed is None:
            return None
        cfg, side = self.nets.vae.cfg, self.crop_size // self.nets.vae.cfg.stride
        generator = torch.Generator().manual_seed((seed * 1_000_003 + first) % 2**63)
        return torch.randn(2, count, cfg.latent_channels, side, side, generator=generator)

    # -- speaking ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def prompts(self, pcm: np.ndarray | Tensor, fps: Fraction, options: Options | None = None) -> Prompts:
        """Speech (S,) float32 mono at 16 kHz -> audio tokens for every frame at `fps`. Raises BadAudio."""
        options = options or Options.for_version(self.nets.version)
        return Prompts(self.nets.whisper, pcm, fps, options.audio_padding_left, options.audio_padding_right)

    @torch.inference_mode()
    def generate(self, latents: Tensor, prompts: Tensor, first_frame: int = 0, fast_from: int | None = None) -> Tensor:
        """Latents (N, 8, h, w), prompts (N, T, C) -> faces (N, S, S, 3) uint8 on the device.

        `fast_from`: by the tiny decoder, right from this row on. Raises NoFastLane where the weights have none.
        When a GPU's memory runs out the same batch is tried once more, since another thread may have held the memory; then
        the batch is halved (for good) until one frame does not fit either.
        """
        made, again = None, False
        while made is None:
            try:
                parts = [slice(i, i + self.largest_batch) for i in range(0, len(latents), self.largest_batch)]
                generator = self.generator if fast_from is None else self._fast(fast_from)
                made = [generator(latents[p], prompts[p]) for p in parts]
            except RuntimeError as e:
                size = min(len(latents), self.largest_batch)
                if not tuning.out_of_memory(e) or (again and size == 1):
                    raise
                log.warning("out of memory", extra={"batch": size, "next_batch": size // 2 if again else size})
            if made is None:  # out of the except block, which holds the tensors
                self._make_room(size // 2 if again else None)
                again = not again
        finite = torch.cat([f for _, f in made])
        if not bool(finite.all()):
            raise NonFiniteOutput(first_frame + int((~finite).nonzero()[0]))
        return torch.cat([face for face, _ in made])

    def _fast(self, first: int) -> tuning.Generator:
        """A generator of faces that are right from row `first` on."""
        if self.fast is None or self.nets.tiny is None:
            raise NoFastLane("these weights have no tiny decoder (taesd/)")
        if self.lower.covers(first):
            return self.fast
        return tuning.plain(self.nets.unet, generate.Lower(self.nets.tiny, self.nets.vae.cfg, 0))

    def _make_room(self, largest: int | None) -> None:
        """Give back what memory is cached on a GPU; with `largest`, generate no more than so many faces at once from now on."""
        if self.nets.device.type == "cuda":
            torch.cuda.empty_cache()
        if largest is not None:
            self.largest_batch = largest
            for generator in (self.generator, self.fast):
                if isinstance(generator, tuning.Recorded):
                    generator.keep(largest)

    def speak(
        self, avatar: Avatar, pcm: np.ndarray, fps: Fraction = Fraction(25), options: Options | None = None
    ) -> Iterator[np.ndarray]:
        """Yield one RGB frame (H, W, 3) uint8 for every 1/fps of the speech, in order.

        Frames without a face pass through untouched.
        """
        options = options or Options.for_version(self.nets.version)
        prompts = self.prompts(pcm, fps, options)
        weights = speech_weights(np.asarray(pcm), fps, len(prompts), options)
        for start in range(0, len(prompts), options.batch_size):
            outputs = range(start, min(start + options.batch_size, len(prompts)))
            slots = [Slot(o, source_index(o, len(avatar), options.loop), weights[o]) for o in outputs]
            made = self.generate_batch(avatar, prompts, slots, options)
            for slot, painted in zip(slots, made, strict=True):
                frame = avatar.frames[slot.source].clone()
                if painted is not None:
                    painted.paste(frame.unbind(-1), painted.face.permute(2, 0, 1))
                yield frame.numpy()

    def generate_batch(
        self, avatar: Avatar | Sequence[Face | None], prompts: Prompts, slots: Sequence[Slot], options: Options
    ) -> list[Painted | None]:
        """What each slot's frame gets pasted; None where it has no face or is silent. May raise NoFastLane."""
        entries = [avatar[slot.source] if slot.weight > 0 else None for slot in slots]
        todo = [(slot, entry) for slot, entry in zip(slots, entries, strict=True) if entry is not None]
        if not todo:
            return [None] * len(slots)
        tokens = prompts.batch([slot.output for slot, _ in todo])
        first = None if options.quality == "exact" else min(blend.first_row(e.place, e.region, self.crop_size) for _, e in todo)
        faces = iter(self.generate(torch.stack([entry.latents for _, entry in todo]), tokens, todo[0][0].output, first))
        return [None if entry is None else Painted(next(faces), entry, slot.region(entry), options.finish)
                for slot, entry in zip(slots, entries, strict=True)]


@dataclass(frozen=True)
class Slot:
    """One output frame: which source frame it shows and how strongly the generated mouth covers it (0..1)."""

    output: int
    source: int
    weight: float = 1.0

    def region(self, face: Face) -> Region:
        """The face's blended region, its mask times the slot's weight."""
        if self.weight == 1:
            return face.region
        return Region(face.region.box, (face.region.mask.float() * self.weight).round().to(torch.uint8))


@dataclass(frozen=True)
class Painted:
    """A generated face (S, S, 3) uint8, on the device, the source's, where it shows and how."""

    face: Tensor
    entry: Face
    region: Region
    finish: Finish

    def paste(self, planes: Sequence[Tensor], levels: Tensor) -> None:
        """Paste the face, as `levels` (C, S, S) uint8 of the planes' kind, into C planes of its frame in place."""
        if self.finish == "natural":
            natural(planes, levels, self.entry.place, self.region, self.entry.lips)
        else:
            blend.paste(planes, levels, self.entry.place.box(), self.region)


def speech_weights(pcm: np.ndarray, fps: Fraction, outputs: int, options: Options) -> list[float]:
    """1 for every frame; with `silence="rest"`, 0 in silences, with a ramp over two frames."""
    if options.silence != "rest":
        return [1.0] * outputs
    speaks = 1.0 - np.array(silent_frames(pcm, fps, outputs), float)
    padded = np.pad(speaks, 2, mode="edge")
    return [float(w) for w in np.convolve(padded, np.ones(5) / 5, mode="valid")]
