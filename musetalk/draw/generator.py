"""The two lanes by which faces are generated, and what a worker learns about them while it runs."""

from __future__ import annotations

import torch
from torch import Tensor

from musetalk.checkpoints import Networks
from musetalk.draw import recorded
from musetalk.draw.fitting import Fitting
from musetalk.draw.generate import Lower
from musetalk.errors import NoFastLane


class FaceGenerator:
    """Latents and audio tokens -> faces, in batches that fit into memory.

    The networks stay as they are; the largest batch and a GPU's recordings are this object's. One film at a time may use it.
    """

    def __init__(self, nets: Networks) -> None:
        self.nets = nets
        self.fitting = Fitting(nets.device, "generate", self._record_anew)
        self.exact: recorded.Generator = recorded.plain(nets.unet, nets.vae)
        self.fast: recorded.Generator | None = None  # of the rows that `lower` decodes
        if nets.tiny is not None:
            self.lower = Lower(nets.tiny, nets.vae.cfg)
            self.fast = recorded.plain(nets.unet, self.lower)

    @torch.inference_mode()
    def record(self, batch_size: int, tokens: int) -> None:
        """On a GPU, record both lanes for batches of up to `batch_size` faces of `tokens` audio tokens each."""
        if self.nets.device.type != "cuda":
            return
        inputs = recorded.examples(self.nets.unet, self.nets.vae, batch_size, tokens)
        self.exact = recorded.Recorded(recorded.plain(self.nets.unet, self.nets.vae), *inputs)
        if self.fast is not None:
            self.fast = recorded.Recorded(recorded.plain(self.nets.unet, self.lower), *inputs)
        self.fitting.largest = min(self.fitting.largest, batch_size)

    @torch.inference_mode()
    def __call__(self, latents: Tensor, prompts: Tensor, fast_from: int | None = None) -> tuple[Tensor, Tensor]:
        """Latents (N, 8, h, w), prompts (N, T, C) -> faces (N, S, S, 3) uint8, finite flags (N,) bool, on the device.

        `fast_from`: by the tiny decoder, right from this row on. Raises NoFastLane where the weights have none.
        """
        lane = self._lane(fast_from)  # where memory ran out a lane is recorded anew, but is the same object
        made = self.fitting.run(lambda part: lane(latents[part], prompts[part]), len(latents))
        return torch.cat([faces for faces, _ in made]), torch.cat([finite for _, finite in made])

    def _lane(self, fast_from: int | None) -> recorded.Generator:
        if fast_from is None:
            return self.exact
        if self.fast is None or self.nets.tiny is None:
            raise NoFastLane("these weights have no tiny decoder (taesd/)")
        if self.lower.covers(fast_from):
            return self.fast
        return recorded.plain(self.nets.unet, Lower(self.nets.tiny, self.nets.vae.cfg, 0))

    def _record_anew(self, largest: int) -> None:
        for lane in (self.exact, self.fast):
            if isinstance(lane, recorded.Recorded):
                lane.keep(largest)
