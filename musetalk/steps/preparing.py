"""The first step: what is known of a face in each source frame.

Entry i of an avatar is a function of the clip and of i alone, however many frames a film needs: a face is followed from the
clip's first frame on, each frame is looked at with the same further ones, and faces are encoded in groups that begin at
multiples of GROUP.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice

import torch
from torch import Tensor

from musetalk.avatar import Avatar, Face
from musetalk.checkpoints import Networks
from musetalk.draw import generate
from musetalk.errors import NoFace
from musetalk.face import track
from musetalk.face.people import Choice
from musetalk.face.steady import Found
from musetalk.face.track import frames_needed
from musetalk.options import Options
from musetalk.pixels.threads import in_parts
from musetalk.show import mask
from musetalk.steps.frame import Frame, Speaker
from musetalk.steps.state import State

GROUP = 8  # source frames that are encoded together: fewer leave cores idle, more delay a film's first frame
SETTLES = 6  # frames in which a mouth that closed counts more and more as still
# Frames that this step holds at most: when it has so many it can hand on the first GROUP of them.
FRAMES_HELD = max(frames_needed(first + GROUP) - first for first in range(0, 100 * GROUP, GROUP))


def frames_to_read(outputs: int) -> int:
    """How many source frames `prepare` takes for a film of so many frames, where the clip has them: a few beyond its end."""
    return frames_needed(entries_needed(outputs))


def entries_needed(outputs: int) -> int:
    """How many entries are made for a film of so many frames: whole groups."""
    return -(-outputs // GROUP) * GROUP


def prepare(frames: Iterable[Frame], speakers: Sequence[Speaker], state: State) -> Generator[Frame, None, None]:
    """The same frames; the speakers' avatars hold the entries of their source frames.

    An avatar that is finished already is used as it is. For all others together, the clip comes first, once, from its
    beginning: as far as it goes, or `frames_to_read(outputs)` frames of it. Speakers share what else decides an avatar. Raises
    NoFace when no frame that the film uses holds a speaker's face.
    """
    new, outputs = [k for k, speaker in enumerate(speakers) if not speaker.avatar.finished], len(speakers[0].prompts)
    frames = iter(frames)
    if new:
        wanted = [(speakers[k].avatar, speakers[k].choice) for k in new]
        try:
            frames = yield from follow(frames, wanted, speakers[0].options, state, entries_needed(outputs))
        except NoFace as e:
            raise NoFace(str(e), choice=new[e.choice]) from None
    for k, speaker in enumerate(speakers):
        used = min(outputs, len(speaker.avatar))
        if speaker.avatar.first_face is None or speaker.avatar.first_face >= used:
            raise NoFace(f"none of its {used} frames holds a face", choice=k)
    yield from frames


def follow(
    frames: Iterator[Frame], wanted: Sequence[tuple[Avatar, Choice]], options: Options, state: State, count: int | None = None,
) -> Generator[Frame, None, Iterator[Frame]]:
    """Add the entries of a clip to empty avatars, one a face: `count` of them, or all. Hands each frame on once its entries are
    there, and returns those for which none were made: they are looked at alone, or show the clip again.
    """
    held: deque[Frame] = deque()
    again: list[Frame] = []  # the first frame that shows an old source frame
    fed = 0

    def pictures() -> Iterator[Tensor]:
        nonlocal fed
        for frame in frames:
            if frame.source < fed:
                again.append(frame)
                return
            fed += 1
            held.append(frame)
            yield frame.rgb(state.nets.device)

    done, nets = 0, state.nets
    found = track.follow(pictures(), nets.detector, nets.pose, [choice for _, choice in wanted],
                         options.bbox_shift if nets.version == "v1" else 0, natural=options.finish == "natural")
    while (count is None or done < count) and (group := list(islice(found, GROUP))):
        for k, (avatar, _) in enumerate(wanted):
            add_entries(avatar, [(picture, faces[k]) for picture, faces in group], options, state)
        done += len(group)
        while held and held[0].source < done:
            yield held.popleft()
    for avatar, _ in wanted:
        avatar.finish(complete=count is None or done < count)
    return chain(held, again, frames)


@torch.inference_mode()
def add_entries(avatar: Avatar, group: Sequence[tuple[Tensor, Found | None]], options: Options, state: State) -> None:
    """Crop, parse and encode the faces of the clip's next pictures (H, W, 3) uint8, in smaller parts where memory runs out."""
    present = [(picture, found) for picture, found in group if found is not None]
    noise = _noise(state.nets, options.seed, len(avatar), len(present))

    def encoded(part: slice) -> list[Face]:
        some, its_noise = present[part], None if noise is None else noise[:, part]
        return list(chain.from_iterable(in_parts(
            lambda p: _faces(some[p], None if its_noise is None else its_noise[:, p], options, state.nets),
            len(some), state.nets.device)))

    made = chain.from_iterable(state.encoder.run(encoded, len(present)))
    for _, found in group:
        avatar.append(None if found is None else _settled(next(made), avatar[len(avatar) - 1] if len(avatar) else None))


def _settled(face: Face, before: Face | None) -> Face:
    """A face and the entry before it -> the face: a mouth that was open counts as still by and by. Entries know the past alone,
    so that none waits for later frames; where the mouth opens it is not shown from that frame on.
    """
    return face if before is None else replace(face, rests=min(face.rests, before.rests + 1 / SETTLES))


def _faces(present: list[tuple[Tensor, Found]], noise: Tensor | None, options: Options, nets: Networks) -> list[Face]:
    """The entries of pictures with their faces; `noise` (2, N, 4, h, w)."""
    geometry = mask.geometry_of(options.finish)
    pictures = [picture.to(nets.device) for picture, _ in present]
    sizes = [(picture.shape[1], picture.shape[0]) for picture in pictures]
    places = [geometry.with_chin(found.place, options.extra_margin, size)
              for (_, found), size in zip(present, sizes, strict=True)]
    crops = torch.stack([geometry.crop(*each, nets.vae.cfg.crop_size) for each in zip(pictures, places, strict=True)])
    latents = generate.latents(nets.vae, crops, None if noise is None else noise.flatten(0, 1)).half().cpu()
    views = torch.stack([geometry.view(*each) for each in zip(pictures, places, strict=True)])
    labels = mask.parse(nets.parser, views)
    masks = mask.label_mask(labels, options.parsing_mode, options.left_cheek_width, options.right_cheek_width)
    regions = [geometry.region(*each) for each in zip(masks, places, sizes, strict=True)]
    lips = torch.stack([mask.lips_map(k, geometry.face_in_view(p)) for k, p in zip(labels, places, strict=True)]).cpu()
    return [Face(place, region, encoded, lip, found.weight, found.person, float(shut))
            for place, region, encoded, lip, (_, found), shut
            in zip(places, regions, latents, lips, present, mask.closed(labels), strict=True)]


def _noise(nets: Networks, seed: int | None, first: int, count: int) -> Tensor | None:
    """Standard normal noise (2, count, 4, h, w) for the posteriors of crops from frame `first` on; None without a seed."""
    if seed is None:
        return None
    cfg, side = nets.vae.cfg, nets.vae.cfg.crop_size // nets.vae.cfg.stride
    generator = torch.Generator().manual_seed((seed * 1_000_003 + first) % 2**63)
    return torch.randn(2, count, cfg.latent_channels, side, side, generator=generator)
