"""How loaded networks are laid out in memory: on a CPU by its capability alone, never by timing; on a GPU as they were loaded.

After this nothing changes a network any more, so several films may run over the same ones at once.
"""

from __future__ import annotations

import torch

from musetalk.checkpoints import Networks
from musetalk.draw.generate import Lower
from musetalk.draw.recorded import examples
from musetalk.nets.fast import Doubling, Packed, fold_upsampling, fuse_relu, input_shapes, multiply_heads, pack
from musetalk.nets.tiny import Tiny
from musetalk.nets.unet import UNet
from musetalk.nets.vae import Vae

TOKENS = 50  # audio tokens a frame with the default padding


@torch.inference_mode()
def fit_cpu(unet: UNet, vae: Vae, tiny: Tiny | None) -> None:
    """Lay loaded networks out for a CPU, in place. Draws one face to learn the shapes that weights are packed for."""
    for net in (unet, vae.decoder, tiny):
        if net is not None:
            fold_upsampling(net)
    multiply_heads(unet)
    multiply_heads(vae)
    latents, prompts = examples(unet, vae, 1, TOKENS)
    pack(unet, input_shapes(unet, lambda: unet(latents, prompts)))
    if tiny is not None:
        lower, drawn = Lower(tiny, vae.cfg), latents[:, : vae.cfg.latent_channels]
        fuse_relu(tiny, input_shapes(tiny, lambda: lower.decode(drawn)))


def described(nets: Networks) -> str:
    """How the networks run on their device, for reports."""
    if nets.device.type != "cpu":
        return "channels last, recorded"
    packed = any(isinstance(m, Packed) for m in nets.unet.modules())
    doubled = any(isinstance(m, Doubling) for m in nets.vae.decoder.modules())
    return ", ".join(["channels last", f"UNet's weights {'packed' if packed else 'plain'}",
                      f"upsampling {'folded' if doubled else 'plain'}", f"{nets.vae.decoded_at_once} decoded at once",
                      torch.backends.cpu.get_cpu_capability()])
