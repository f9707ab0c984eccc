"""How loaded networks lie in memory: on a CPU by capability alone, never by timing; on a GPU as they were loaded."""

from __future__ import annotations

import torch

from musetalk.checkpoints import Networks
from musetalk.nets.layers import Doubling, Packed, fold_upsampling, fuse_relu, pack
from musetalk.nets.tiny import Tiny
from musetalk.nets.unet import UNet
from musetalk.nets.vae import Vae


def fit_cpu(unet: UNet, vae: Vae, tiny: Tiny | None) -> None:
    """Lay loaded networks out for a CPU, in place."""
    for net in (unet, vae.decoder, tiny):
        if net is not None:
            fold_upsampling(net)
    pack(unet)
    if tiny is not None:
        fuse_relu(tiny)


def described(nets: Networks) -> str:
    """How the networks run on their device, for reports."""
    if nets.device.type != "cpu":
        return "channels last, recorded"
    packed = any(isinstance(m, Packed) for m in nets.unet.modules())
    doubled = any(isinstance(m, Doubling) for m in nets.vae.decoder.modules())
    return ", ".join(["channels last", f"UNet's weights {'packed' if packed else 'plain'}",
                      f"upsampling {'folded' if doubled else 'plain'}", f"{nets.vae.decoded_at_once} decoded at once",
                      torch.backends.cpu.get_cpu_capability()])
