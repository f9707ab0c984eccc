"""Each network at its published size against the upstream implementation's outputs on the same seeded weights.

Each check prints the largest difference beside the reference's own noise floor (float32 against float64, another
batch size, another memory format).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from musetalk.nets import layers
from musetalk.nets.bisenet import BiSeNet
from musetalk.nets.fast import (
    Doubling,
    Packed,
    PackedLinear,
    can_pack,
    fold_batch_norm,
    fold_upsampling,
    fuse_relu,
    heads_as_products,
    input_shapes,
    multiply_heads,
    pack,
)
from musetalk.nets.rtmpose import RtmPose
from musetalk.nets.s3fd import S3fd
from musetalk.nets.tiny import Tiny, TinyConfig
from musetalk.nets.unet import UNet, audio_positions
from musetalk.nets.vae import Vae, VaeConfig
from musetalk.nets.whisper import WhisperEncoder
from tests import seeded

GOLDENS = Path(__file__).parent / "goldens"
IMAGENET = (torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225]))


def golden(name: str) -> dict[str, Any]:
    with np.load(GOLDENS / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def build(net_class: type[nn.Module], table: str, prefix: str = "") -> nn.Module:
    state = seeded.state_dict(table)
    assert seeded.digest(state) == seeded.DIGESTS[table]
    with torch.device("meta"):
        net = net_class()
    net.load_state_dict({k.removeprefix(prefix): v for k, v in state.items()}, assign=True, strict=True)
    return net.eval().requires_grad_(False)


def close(name: str, got: Tensor, want: Any, atol: float, floor: float) -> None:
    difference = float((got - torch.from_numpy(np.asarray(want))).abs().max())
    print(f"{name}: max difference {difference:.2e}, reference floor {floor:.1e}, limit {atol:.0e}")
    assert difference <= atol, name


@pytest.mark.full
def test_unet() -> None:
    g = golden("unet")
    net = build(UNet, "unet")
    latents, audio = torch.from_numpy(g["latents"]), torch.from_numpy(g["audio"])
    seen: dict[str, Tensor] = {}
    net.mid_block.register_forward_hook(lambda _m, _i, out: seen.__setitem__("mid_block", out))
    with torch.inference_mode():
        close("unet", net(latents, audio), g["out"], 5e-5, 1.5e-5)
        close("unet mid_block", seen["mid_block"], g["mid_block"], 3e-4, 6e-5)
        net.fold_time()
        assert net.time() is None
        close("unet, time folded", net(latents, audio), g["out"], 5e-5, 1.5e-5)
        fold_upsampling(net)
        close("unet, upsampling folded", net(latents, audio), g["out"], 5e-5, 1.5e-5)
        half = net.to(torch.bfloat16, memory_format=torch.channels_last)(latents.bfloat16(), audio.bfloat16()).float()
        error = (half - torch.from_numpy(g["out"])).abs()
        print(f"unet bfloat16: mean {float(error.mean()):.3f}, max {float(error.max()):.3f}; reference 0.023, 0.11")
        assert float(error.mean()) < 0.05
        net.float()
        swapped = net(latents, audio.flip(0))
        assert float((swapped - torch.from_numpy(g["out"])).std()) > 0.5  # the audio matters


def test_unet_time_embedding_of_zero() -> None:
    from musetalk.nets.unet import TimeEmbedding

    g = golden("unet")
    embedding = TimeEmbedding(320)
    prefix = "time_embedding."
    state = {k.removeprefix(prefix): torch.from_numpy(np.asarray(seeded.tensor(k, s)))
             for k, s in seeded.table("unet").items() if k.startswith(prefix)}
    embedding.load_state_dict(state, strict=True)
    signal = torch.cat([torch.ones(1, 160), torch.zeros(1, 160)], dim=1)
    with torch.inference_mode():
        close("time embedding", embedding(signal), g["time_embedding"], 5e-5, 1e-6)


def test_vae() -> None:
    g = golden("vae")
    net = build(Vae, "vae_published")
    image = torch.from_numpy(g["image_rgb"]).permute(2, 0, 1)[None].float().div(255).sub(0.5).div(0.5)
    with torch.inference_mode():
        mean, logvar = net.moments(image)
        close("vae mean", mean, g["mean"], 5e-5, 6.2e-6)
        close("vae logvar", logvar, g["logvar"], 5e-5, 5.3e-6)
        decoded = net.decode(torch.from_numpy(g["latent"]) * net.cfg.scaling_factor)[0]
    close("vae decode", decoded, g["decoded"], 1e-4, 2.0e-5)
    levels = [((x / 2 + 0.5).clamp(0, 1) * 255).round() for x in (decoded, torch.from_numpy(g["decoded"]))]
    assert float((levels[0] != levels[1]).float().mean()) <= 1e-3


@pytest.mark.full  # `test_folded_upsampling` and the tiny decoder's tests are of the same, in small
def test_vae_as_a_worker_runs_it() -> None:
    g = golden("vae")
    net = build(Vae, "vae_published")
    latent = torch.from_numpy(g["latent"]) * net.cfg.scaling_factor
    fold_upsampling(net.decoder)
    with torch.inference_mode():
        close("vae decode, upsampling folded", net.decode(latent)[0], g["decoded"], 1e-4, 2.0e-5)
        half = net.to(torch.bfloat16, memory_format=torch.channels_last).decode(latent.bfloat16())[0].float()
    error = (half - torch.from_numpy(g["decoded"])).abs()
    print(f"vae decode bfloat16: mean {float(error.mean()):.4f}, max {float(error.max()):.3f}; reference 0.004, 0.03")
    assert float(error.mean()) < 0.01


def test_the_vae_takes_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Vae(VaeConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, crop_size=16)).eval()
    images, latents, noise = torch.rand(5, 3, 16, 16), torch.rand(5, 4, 8, 8), torch.randn(5, 4, 8, 8)
    seen: list[int] = []
    for part in (net.encoder, net.decoder):
        part.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    with torch.inference_mode():
        whole = net.encode(images, noise), net.decode(latents)
        monkeypatch.setitem(layers.MAP_BYTES, "cpu", 2 * 16 * 16 * 16 * 4)  # two maps of the decoder, four of the encoder
        parts = net.encode(images, noise), net.decode(latents)
    assert seen == [5, 5, 4, 1, 2, 2, 1]
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


def test_whisper() -> None:
    g = golden("whisper")
    net = build(WhisperEncoder, "whisper_encoder", "model.encoder.")
    from musetalk.sound.features import log_mel, whisper_states

    short = torch.from_numpy(g["short_wav_int16"].astype(np.float32) / 32768)
    mel = log_mel(torch.nn.functional.pad(short, (0, 480000 - len(short))))
    close("mel", mel[:, :400], g["short_mel"], 5e-5, 1.3e-5)
    assert float(mel[:, 400:].min()) == pytest.approx(float(g["short_mel_floor"]), abs=5e-5)
    with torch.inference_mode():
        states = whisper_states(net, short)
        close("whisper", states[:170], g["short_hidden"], 1e-4, 1.0e-5)
        close("whisper tail", states[1490:1500], g["short_hidden_tail"], 1e-4, 1.0e-5)
        states = whisper_states(net, torch.from_numpy(g["long_wav_int16"].astype(np.float32) / 32768))
    close("whisper long, head", states[:4], g["long_hidden_head"], 1e-4, 1.0e-5)
    close("whisper long, border of pieces", states[1480:1560], g["long_hidden_1480_1560"], 1e-4, 1.0e-5)


def test_bisenet() -> None:
    g = golden("bisenet")
    net = build(BiSeNet, "bisenet")
    image = torch.from_numpy(g["image_rgb"]).permute(2, 0, 1).float() / 255
    image = ((image - IMAGENET[0][:, None, None]) / IMAGENET[1][:, None, None])[None]
    for fold in (False, True):
        if fold:
            fold_batch_norm(net)
        with torch.inference_mode():
            logits = net(image)
            close("bisenet", logits, g["logits_64"], 1e-4, 1.8e-5)
            full = torch.nn.functional.interpolate(logits, size=512, mode="bilinear", align_corners=True)
        assert int((full.argmax(1)[0] != torch.from_numpy(g["labels"])).sum()) <= 20


@pytest.mark.parametrize("prefix", ["", "odd_"])
def test_s3fd(prefix: str) -> None:
    g = golden("s3fd")
    net = build(S3fd, "s3fd")
    if prefix:
        from musetalk.face.detect import s3fd_input

        image = s3fd_input(torch.from_numpy(g["odd_image_bgr"].copy()).flip(-1)[None])
    else:
        image = torch.from_numpy(g["net_in"])
    with torch.inference_mode():
        levels = net(image)
    for i, (conf, loc) in enumerate(levels, start=1):
        close(f"s3fd {prefix}cls{i}", conf, g[f"{prefix}cls{i}"], 1e-4, 1.1e-5)
        close(f"s3fd {prefix}reg{i}", loc, g[f"{prefix}reg{i}"], 1e-4, 1.1e-5)


def test_rtmpose() -> None:
    g = golden("rtmpose_net")
    net = build(RtmPose, "dwpose")
    from musetalk.face.landmarks import decode_simcc, pose_input, simcc_mean

    image = pose_input(torch.from_numpy(g["image_rgb"])[None])
    for fold in (False, True):
        if fold:
            fold_batch_norm(net)
        with torch.inference_mode():
            x, y = net(image)
            close("rtmpose x", x, g["simcc_x"], 1e-3, 1.4e-4)
            close("rtmpose y", y, g["simcc_y"], 1e-3, 1.4e-4)
            mx, my = net(image.flip(-1))
            close("rtmpose mirrored x", mx, g["simcc_x_mirrored"], 1e-3, 1.4e-4)
            ax, ay = simcc_mean((x, y), (mx, my))
            close("rtmpose averaged x", ax[:, :32], g["simcc_x_avg_first32"], 1e-3, 1.4e-4)
            points, scores = decode_simcc(ax, ay)
        np.testing.assert_array_equal(points[0].numpy(), g["keypoints_input_px"].reshape(133, 2))
        np.testing.assert_allclose(scores[0].numpy(), g["scores"].reshape(133), atol=1e-3)


def test_audio_positions() -> None:
    g = golden("positional_encoding")
    close("position code", audio_positions(50, 384), g["table"], 4e-6, 3.1e-6)


def test_tiny_decoder() -> None:
    g = golden("tiny")
    net, latents = build(Tiny, "tiny"), torch.from_numpy(g["latents"])
    with torch.inference_mode():
        close("tiny decoder", net.decode(latents), g["decoded"], 2e-5, 5.0e-6)
        fold_upsampling(net)
        fuse_relu(net, input_shapes(net, lambda: net.decode(latents)))
        close("tiny decoder, folded and fused", net.decode(latents), g["decoded"], 2e-5, 5.0e-6)
        half = build(Tiny, "tiny").to(torch.bfloat16, memory_format=torch.channels_last).decode(latents.bfloat16())
    error = (half - torch.from_numpy(g["decoded"])).abs()
    print(f"tiny decoder bfloat16: mean {float(error.mean()):.4f}, max {float(error.max()):.3f}; reference 0.007, 0.044")
    assert float(error.mean()) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fit", [False, True])
@pytest.mark.parametrize("blocks", [(3, 3, 3, 1), (1, 2, 1)])
def test_rows_of_the_tiny_decoder_are_the_whole_picture_s(
    dtype: torch.dtype, blocks: tuple[int, ...], fit: bool
) -> None:
    """Bit for bit, whatever rows are asked for; and one row less of what is taken in would show."""
    torch.manual_seed(1)
    net = Tiny(TinyConfig(decoder_block_out_channels=(16,) * len(blocks), num_decoder_blocks=blocks)).requires_grad_(False)
    net.to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    latents = torch.randn(2, 4, 24, 16).to(dtype).contiguous(memory_format=torch.channels_last)
    if fit:
        fold_upsampling(net)
        with torch.inference_mode():
            fuse_relu(net, input_shapes(net, lambda: net.decode(latents)))
    height = 24 * net.cfg.stride
    random = np.random.default_rng(2)
    cases = [(0, height), (0, 1), (height - 1, height), (height * 7 // 16, height),
             *(sorted(random.choice(height + 1, 2, replace=False).tolist()) for _ in range(24))]
    with torch.inference_mode():
        whole = net.decode(latents)
        for first, stop in cases:
            assert torch.equal(net.decode(latents, (first, stop)), whole[:, :, first:stop]), (first, stop)
        true = net.decoder.needed
        net.decoder.needed = lambda rows, size: [(a + (a > 0), b) for a, b in true(rows, size)]  # type: ignore[method-assign]
        assert not torch.equal(net.decode(latents, (height - 8, height)), whole[:, :, -8:])


@pytest.mark.parametrize("bias", [False, True])
def test_folded_upsampling(bias: bool) -> None:
    """Odd sizes, and more outputs than inputs."""
    conv = nn.Conv2d(6, 10, 3, padding=1, bias=bias).requires_grad_(False)
    x = torch.randn(2, 6, 5, 7)
    with torch.inference_mode():
        plain = conv(torch.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest"))
        torch.testing.assert_close(Doubling(conv)(x), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights(dtype: torch.dtype) -> None:
    """The same up to rounding, also for maps of another size than that they were packed for."""
    if not can_pack(dtype):
        pytest.skip("this CPU does not pack")
    net = nn.ModuleList([nn.Conv2d(128, 128, 3, 2, padding=1), nn.Conv2d(256, 256, 1), nn.Conv2d(3, 4, 1), nn.Linear(256, 256)])
    net.requires_grad_(False).to(dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]
    inputs = [torch.randn(2, c, 10, 12).to(dtype).contiguous(memory_format=torch.channels_last) for c in (128, 256, 3)]
    inputs += [torch.randn(2, 20, 256).to(dtype)]
    with torch.inference_mode():
        plain = [[layer(x), layer(x[..., :6, :])] for layer, x in zip(net, inputs, strict=True)]
        pack(net, input_shapes(net, lambda: [layer(x) for layer, x in zip(net, inputs, strict=True)]))
        packed = [[layer(x), layer(x[..., :6, :])] for layer, x in zip(net, inputs, strict=True)]
    assert [isinstance(layer, Packed | PackedLinear) for layer in net] == [True, True, False, dtype == torch.bfloat16]
    limit = 1e-5 if dtype == torch.float32 else 2**-6
    for a, b in zip(plain, packed, strict=True):
        torch.testing.assert_close(a, b, rtol=limit, atol=limit)


@pytest.mark.parametrize("heads", [1, 8])
def test_attention_by_products(heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """All heads at once, some at once, and one whose scores are too large for the caches."""
    q, k, v = (torch.randn(3, n, 64).bfloat16() for n in (40, 24, 24))
    plain = layers.attend(q, k, v, heads)
    for limit in (8 << 20, 5 * 40 * 24 * 2, 100):
        monkeypatch.setitem(layers.MAP_BYTES, "cpu", limit)
        torch.testing.assert_close(heads_as_products(q, k, v, heads), plain, rtol=2**-6, atol=2**-6)


def test_only_bfloat16_multiplies_heads() -> None:
    for dtype, chosen in ((torch.float32, layers.attend), (torch.bfloat16, heads_as_products)):
        net = Vae(VaeConfig(block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, crop_size=16)).to(dtype)
        multiply_heads(net)
        assert [m.attend for m in net.modules() if hasattr(m, "attend")] == [chosen, chosen]
