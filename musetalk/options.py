"""What a caller may tune. The one definition: the worker's request fields and command line are made from it.

Knows no torch, so that a command line can show its help at once.
"""

# ruff: noqa: RUF009 (an option is a dataclass field)
from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from musetalk.errors import BadInput

ParsingMode = Literal["jaw", "raw", "neck"]
Loop = Literal["pingpong", "repeat", "hold"]
Quality = Literal["exact", "fast"]
Finish = Literal["natural", "official"]
Silence = Literal["auto", "model", "rest"]
V1: dict[str, Any] = {"extra_margin": 0, "parsing_mode": "raw"}  # upstream's other defaults, for MuseTalk 1.0


def _option(default: Any, description: str, *, ge: float | None = None, le: float | None = None, avatar: bool = False) -> Any:
    """A field with its range (inclusive); `avatar`: it changes what is prepared from the source clip."""
    limits = {k: v for k, v in (("ge", ge), ("le", le)) if v is not None}
    return field(default=default, metadata={"description": description, "limits": limits, "avatar": avatar})


@dataclass(frozen=True)
class Options:
    """Defaults are upstream's for MuseTalk 1.5; `for_version` knows those for 1.0."""

    extra_margin: int = _option(10, "chin below the face box: in 0.3 % of the face's height, at most 20 %; official: in pixels",
                                ge=0, le=200, avatar=True)
    parsing_mode: ParsingMode = _option("jaw", "which parsed parts are replaced", avatar=True)
    left_cheek_width: int = _option(90, "columns of the 512-pixel parse map, mode jaw", ge=0, le=256, avatar=True)
    right_cheek_width: int = _option(90, "columns of the 512-pixel parse map, mode jaw", ge=0, le=256, avatar=True)
    bbox_shift: int = _option(0, "MuseTalk 1.0 only: lowers the mask's middle, pixels", ge=-200, le=200,
                              avatar=True)
    audio_padding_left: int = _option(2, "video frames heard before the own one", ge=0, le=10)
    audio_padding_right: int = _option(2, "video frames heard after the own one", ge=0, le=10)
    face: Literal["largest", "leftmost", "rightmost"] | int = _option(
        "largest", "which face speaks; N counts from the left", ge=0, le=99, avatar=True)
    loop: Loop = _option("pingpong", "what follows the clip's end")
    silence: Silence = _option("auto", "in silences; auto: closed; rest: the source's")
    openness: float = _option(1.0, "how wide the mouth opens, 0.5 to 1.5", ge=0.5, le=1.5)
    seed: int | None = _option(None, "sample the posterior of the VAE with this seed; default: its mean",
                               ge=0, le=2**63 - 1, avatar=True)
    batch_size: int = _option(8, "frames generated at once", ge=1, le=64)
    quality: Quality = _option("exact", "fast: the tiny decoder")
    finish: Finish = _option("natural", "official: upstream's, without source detail", avatar=True)

    def __post_init__(self) -> None:
        """Raises BadInput for a word or a number that an option does not take."""
        for option, kind in zip(fields(self), get_type_hints(Options).values(), strict=True):
            value, limits = getattr(self, option.name), option.metadata["limits"]
            words = [word for k in (kind, *get_args(kind)) if get_origin(k) is Literal for word in get_args(k)]
            within = limits and isinstance(value, (int, float)) and limits["ge"] <= value <= limits["le"]
            if not (within or value in words or value is option.default):
                taken = [*words, *([f"{limits['ge']} to {limits['le']}"] if limits else [])]
                raise BadInput(f"{option.name}={value!r}: give {', '.join(taken)}")

    @classmethod
    def for_version(cls, version: str, **given: Any) -> Options:
        """The options given, else the defaults for the weights' version ("v1" or "v15")."""
        return cls(**{**(V1 if version == "v1" else {}), **given})

    def avatar_part(self) -> dict[str, object]:
        """The options that change a prepared avatar."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.metadata["avatar"]}
