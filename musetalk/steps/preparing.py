"""The first step: what is known of a face in each source frame.

Entry i of an avatar is a function of the clip and of i alone, however many frames a film needs: a face is followed from the
clip's first frame on, each frame is looked at with the same further ones, and faces are encoded in groups that begin at
multiples of GROUP.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, islice, pairwise
from typing import TypeVar

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
from musetalk.geometry.box import Region
from musetalk.geometry.place import Place
from musetalk.options import Options
from musetalk.pixels.threads import in_parts
from musetalk.show import mask
from musetalk.show.mask import Parsed
from musetalk.steps.frame import Frame, Speaker
from musetalk.steps.state import State

T = TypeVar("T")
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
    made = iter(_faces(present, len(avatar), options, state) if present else ())
    for _, found in group:
        avatar.append(None if found is None else _settled(next(made), avatar[len(avatar) - 1] if len(avatar) else None))


def _settled(face: Face, before: Face | None) -> Face:
    """A face and the entry before it -> the face: a mouth that was open counts as still by and by. Entries know the past alone,
    so that none waits for later frames; where the mouth opens it is not shown from that frame on.
    """
    return face if before is None else replace(face, rests=min(face.rests, before.rests + 1 / SETTLES))


def _faces(present: Sequence[tuple[Tensor, Found]], first: int, options: Options, state: State) -> list[Face]:
    """The entries of pictures with their faces, the first of which is frame `first` or a later one.

    The natural finish parses faces as often as they change; masks of those between are mixed.
    """
    geometry, nets, natural = mask.geometry_of(options.finish), state.nets, options.finish == "natural"
    noise = _noise(nets, options.seed, first, len(present))
    pictures = [picture.to(nets.device) for picture, _ in present]
    sizes = [(picture.shape[1], picture.shape[0]) for picture in pictures]
    places = [geometry.with_chin(found.place, options.extra_margin, size)
              for (_, found), size in zip(present, sizes, strict=True)]

    def cropped(part: slice) -> Tensor:
        return torch.stack([geometry.crop(*each, nets.vae.cfg.crop_size)
                            for each in zip(pictures[part], places[part], strict=True)])

    def encoded(part: slice) -> Tensor:
        return generate.latents(nets.vae, crops[part], None if noise is None else noise[:, part].flatten(0, 1)).half().cpu()

    def parsed(part: slice) -> list[Parsed]:
        return _parsed([pictures[i] for i in keys[part]], [places[i] for i in keys[part]], options, nets)

    def regions(part: slice) -> list[Region]:
        return [geometry.region(known.mask, place, size)
                for known, place, size in zip(faces[part], places[part], sizes[part], strict=True)]

    crops = torch.cat(_in_parts(cropped, len(present), state))
    latents = torch.cat(_in_parts(encoded, len(present), state))
    keys = mask.to_parse(crops) if natural else list(range(len(present)))
    faces = _between(keys, list(chain.from_iterable(_in_parts(parsed, len(keys), state))))
    shown = chain.from_iterable(_in_parts(regions, len(present), state))
    return [Face(place, region, latent, known.lips, found.weight, found.person, float(known.closed))
            for place, region, latent, known, (_, found) in zip(places, shown, latents, faces, present, strict=True)]


def _in_parts(work: Callable[[slice], T], count: int, state: State) -> list[T]:
    """`work` on slices that together cover range(count): side by side on a CPU, in smaller ones where memory runs out."""
    def fitting(part: slice) -> list[T]:
        return in_parts(lambda p: work(slice(part.start + p.start, part.start + p.stop)), part.stop - part.start,
                        state.nets.device)

    return list(chain.from_iterable(state.encoder.run(fitting, count)))


def _parsed(pictures: Sequence[Tensor], places: Sequence[Place], options: Options, nets: Networks) -> list[Parsed]:
    """What the parser says of faces."""
    geometry = mask.geometry_of(options.finish)
    labels = mask.parse(nets.parser, torch.stack([geometry.view(*each) for each in zip(pictures, places, strict=True)]))
    return mask.read(labels, [geometry.face_in_view(place) for place in places], options)


def _between(keys: Sequence[int], parsed: Sequence[Parsed]) -> list[Parsed]:
    """What is known of all faces, of those that were parsed."""
    faces = [parsed[0]]
    for (a, b), (one, other) in zip(pairwise(keys), pairwise(parsed), strict=True):
        faces += [one.towards(other, (i - a) / (b - a)) for i in range(a + 1, b)] + [other]
    return faces


def _noise(nets: Networks, seed: int | None, first: int, count: int) -> Tensor | None:
    """Standard normal noise (2, count, 4, h, w) for the posteriors of crops from frame `first` on; None without a seed."""
    if seed is None:
        return None
    cfg, side = nets.vae.cfg, nets.vae.cfg.crop_size // nets.vae.cfg.stride
    generator = torch.Generator().manual_seed((seed * 1_000_003 + first) % 2**63)
    return torch.randn(2, count, cfg.latent_channels, side, side, generator=generator)
