"""Each algorithm step against upstream's own outputs: exact unless a tolerance is named."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from musetalk import order
from musetalk.draw import generate
from musetalk.face import detect, landmarks
from musetalk.geometry import upstream
from musetalk.geometry.box import Box, Region, region_of
from musetalk.geometry.place import Place
from musetalk.options import Loop
from musetalk.pixels import resample as imaging
from musetalk.show import blend, mask
from musetalk.sound import features as audio
from tests.seeded import seeded_uniform
from tests.test_networks import golden


def t(array: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


# -- audio -----------------------------------------------------------------------------------------------------------


def test_windows_at_the_rates_upstream_works_for() -> None:
    g = golden("audio_windows")
    failed = {str(f).split(":")[0] for f in g["failed"]}
    checked = 0
    for key in (k for k in g if k.startswith("steps_")):
        rate, samples = key.split("_")[1:]
        fps, samples = int(float(rate)), int(samples)  # upstream truncates the rate: 29.97 is heard at 29
        steps = audio.step_count(samples)
        if not 25 <= fps < 50 or f"{rate}_{samples}" in failed or steps < 12:
            continue  # elsewhere upstream is wrong: see the next test
        for frame, want in enumerate(g[key]):
            start = audio.window_start(frame, Fraction(fps), 2)
            got = [s if 0 <= s < steps else -1 for s in range(start, start + 10)]
            assert got == want.tolist(), (key, frame)
            checked += 1
    print(f"{checked} windows equal")
    assert checked > 1000


@pytest.mark.parametrize("fps", [Fraction(10), Fraction(24), Fraction(24000, 1001), Fraction(30000, 1001), Fraction(50),
                                 Fraction(60), Fraction(100)])
def test_windows_stay_around_their_frame_at_every_rate(fps: Fraction) -> None:
    """Upstream drifts at fractional rates, listens to the past below 25 fps and dies at 50 and above."""
    for frame in (0, 1, 7, 1000, 100_000):
        own = frame / fps * 50  # the encoder step at which the frame is shown
        assert abs(float(audio.window_start(frame, fps, 2) + 4 - own)) < 1


@pytest.mark.parametrize("frame", [3, 9, 3603, 215_997])
def test_between_two_steps_a_frame_at_60_fps_hears_the_earlier_one(frame: int) -> None:
    """Always the later one would make the mouth early, on an average of all frames."""
    own = Fraction(frame * 50, 60)
    assert own.denominator == 2, "half-way"
    assert audio.window_start(frame, Fraction(60), 2) + 4 == own - Fraction(1, 2)


def test_window_tokens() -> None:
    g = golden("audio_windows")
    hidden = t(seeded_uniform("windows.hidden", (1, 3000, 5, 4), 7))[0]
    checked = 0
    for key in (k for k in g if k.startswith("tokens_") and not k.endswith("_frames")):
        fps, samples = int(float(key.split("_")[1])), int(key.split("_")[2])
        if not 25 <= fps < 50:
            continue
        steps = audio.step_count(samples)
        for row, frame in enumerate(g[f"{key}_frames"]):
            got = audio.windows(hidden, range(int(frame), int(frame) + 1), Fraction(fps), steps)
            np.testing.assert_array_equal(got[0].numpy(), g[key][row])
            checked += 1
    assert checked


def test_frame_count_is_the_speech_length_at_fractional_rates() -> None:
    assert audio.frame_count(60 * 16000, Fraction(30000, 1001)) == 1798  # upstream: 1740
    assert audio.frame_count(60 * 16000, Fraction(24000, 1001)) == 1439
    assert audio.frame_count(1, Fraction(25)) == 1


@pytest.mark.parametrize("fps", ["1", "2", "3", "5", "10", "12", "15", "24000/1001", "24", "25", "30000/1001", "30", "50",
                                 "60"])
def test_a_slow_film_is_as_long_as_its_speech(fps: str) -> None:
    """From 23.976 fps on the count is the nearest; below, less than 21 ms of the end have no frame."""
    rate = Fraction(fps)
    for samples in range(1, 64_000, 97):
        count = audio.frame_count(samples, rate)
        assert samples / 16_000 - count / rate <= Fraction(21, 1000)
        assert count == 1 or (count - 1) / rate < Fraction(samples, 16_000), "no frame begins after the speech's end"
        if rate > 23:
            assert count == max(1, round(samples * rate / 16_000))


# -- faces -----------------------------------------------------------------------------------------------------------


def test_face_boxes() -> None:
    g = golden("boxes")
    width, height = (int(v) for v in g["frame_size"])
    for i, name in enumerate(g["names"]):
        detection = g["s3fd_box"][i]
        if (detection < 0).all():
            continue  # no face: one None per frame here, zeros upstream
        points = t(g["keypoints133"][i][landmarks.FACE_POINTS]).trunc().long()
        got = upstream.face_box(points, Box(*detection.tolist()), int(g["bbox_shift"][i]))
        assert [got.x1, got.y1, got.x2, got.y2] == g["box"][i].tolist(), name
        inside = got.clipped(width, height)  # upstream never clamps to the far border
        assert inside.x2 <= width
        assert inside.y2 <= height


def test_crops() -> None:
    g = golden("steps")
    for i in range(20):
        if f"crop{i}" not in g:
            break
        frame = t(g[f"frame_{g[f'crop{i}_frame']}"])
        box = Box(*g[f"crop{i}_box"].tolist()).extended_down(10, frame.shape[0])
        got = upstream.crop(frame, Place.of(box), 256).numpy()
        got = got if g[f"crop{i}"].shape[0] == 256 else got[::4, ::4]
        difference = np.abs(got.astype(int) - g[f"crop{i}"].astype(int))
        print(f"crop{i}: {int((difference > 0).sum())} of {difference.size} values differ, max {difference.max()}")
        assert difference.max() <= 1
        assert (difference > 0).mean() < 1e-3
    assert i >= 8


def test_pose_picture() -> None:
    g = golden("rtmpose_input")
    for size in ("landscape", "portrait", "small", "big"):
        image = t(g[f"{size}_image_bgr"])
        where = landmarks.PoseFrame.whole(image.shape[1], image.shape[0])
        got = landmarks.pose_picture(image, where).numpy()
        np.testing.assert_array_equal(got, g[f"{size}_opencv49_bgr"], err_msg=size)


def test_simcc_decoding() -> None:
    g = golden("simcc_decode")
    plain, mirrored = ((t(g[f"simcc_x{m}"]).float(), t(g[f"simcc_y{m}"]).float()) for m in ("", "_mirrored"))
    points, scores = landmarks.decode_simcc(*landmarks.simcc_mean(plain, mirrored))
    sizes = [k.split("_")[1] for k in g if k.startswith("keypoints_")]
    for size in sizes:
        width, height = (int(v) for v in size.split("x"))
        got = landmarks.to_frame(points[0], landmarks.PoseFrame.whole(width, height))
        np.testing.assert_allclose(got.numpy(), g[f"keypoints_{size}"], atol=1e-4, err_msg=size)
        np.testing.assert_array_equal(got.trunc().numpy(), np.trunc(g[f"keypoints_{size}"]))
        np.testing.assert_allclose(scores[0].numpy(), g[f"scores_{size}"], atol=1e-6)
    assert sizes


def test_s3fd_decoding() -> None:
    g = golden("s3fd_decode")
    for case in g["cases"]:
        levels = [(t(g[f"{case}_cls{i}"]), t(g[f"{case}_reg{i}"])) for i in range(1, 7)]
        found = detect.decode_s3fd(levels)
        want = g[f"{case}_kept"]
        got = np.array([[d.x1, d.y1, d.x2, d.y2, d.score] for d in found]).reshape(-1, 5)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3, err_msg=str(case))
        if found:
            b = found[0].box()
            assert [b.x1, b.y1, b.x2, b.y2] == g[f"{case}_box"].tolist(), case
        else:
            assert (g[f"{case}_box"] == -1).all()


# -- latents ---------------------------------------------------------------------------------------------------------


def test_vae_inputs() -> None:
    g = golden("steps")
    for i in (0, 2):
        masked, reference = generate.vae_inputs(t(g[f"crop{i}"][..., ::-1])[None])  # the goldens' crops are BGR
        np.testing.assert_array_equal(masked[..., ::4, ::4].numpy().squeeze(), g[f"vae_in_masked{i}_every4"].squeeze())
        np.testing.assert_array_equal(
            reference[..., ::4, ::4].numpy().squeeze(), g[f"vae_in_reference{i}_every4"].squeeze())


def test_decoded_to_uint8() -> None:
    g = golden("steps")
    got = generate.to_levels(t(g["decoded"])).numpy()
    np.testing.assert_array_equal(got[..., ::-1], g["decoded_uint8_bgr"])


def test_posterior() -> None:
    g = golden("steps")
    moments = t(g["posterior"])
    mean, logvar = moments.chunk(2, dim=1)
    noise = t(g["noise"]).reshape(mean.shape)
    sampled = 0.18215 * (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * noise)
    np.testing.assert_allclose(sampled.numpy().ravel(), g["latents_sampled"].ravel(), atol=1e-6)
    np.testing.assert_allclose((0.18215 * mean).numpy().ravel(), g["latents_mean"].ravel(), atol=1e-7)


def test_linear_resize() -> None:
    g = golden("steps")
    face = t(g["face256"])
    thinned = {str(n) for n in g["linear_subsampled"]}
    for key in (k for k in g if k.startswith("linear_") and k != "linear_subsampled"):
        width, height = (int(v) for v in key.split("_")[1].split("x"))
        got = imaging.linear(face.permute(2, 0, 1), height, width, slice(0, height), slice(0, width)).permute(1, 2, 0).numpy()
        got = got[::3, ::3] if key in thinned or got.shape != g[key].shape else got
        np.testing.assert_array_equal(got, g[key], err_msg=key)


# -- blending --------------------------------------------------------------------------------------------------------


def test_label_masks() -> None:
    g = golden("parsing_masks")
    dot = torch.zeros(1, 512, 512, dtype=torch.bool)
    dot[0, 256, 256] = True
    grown = mask._dilate_jaw(dot)[0, 240:273, 240:273].numpy()
    np.testing.assert_array_equal(grown[::-1, ::-1], g["jaw_kernel"] > 0)
    for key in (k for k in g if k.startswith("mask_")):
        name, mode, cheeks = re.fullmatch(r"mask_(.+?)_(raw|neck|jaw)(?:_(\d+_\d+))?", key).groups()  # type: ignore[union-attr]
        labels = t(g[f"labels_{name}"])[None]
        left, right = (int(v) for v in cheeks.split("_")) if cheeks else (90, 90)
        want = np.unpackbits(g[key]).reshape(512, 512) > 0
        np.testing.assert_array_equal(mask.label_mask(labels, mode, left, right)[0].numpy(), want, err_msg=key)


def test_blending() -> None:
    g, maps = golden("blend"), golden("parsing_masks")
    face = t(g["face256"])
    for i, case in enumerate(g["cases"]):
        frame, box = t(g[f"frame_{g['frames'][i]}"]), Box(*g["boxes"][i].tolist())
        square = upstream.blend_square(box)
        assert [square.x1, square.y1, square.x2, square.y2] == g[f"{case}_cropbox"].tolist()
        labels = t(maps[f"labels_{g['label_maps'][i]}"])[None]
        mask512 = mask.label_mask(labels, str(g["modes"][i]), *g["cheeks"][i].tolist())[0]  # type: ignore[arg-type]
        for share, prefix in ((0.05, ""), (0.1, "_rt")):
            if f"{case}{prefix}_mask" not in g:
                continue
            soft = upstream.soft_mask(mask512.to(torch.uint8) * 255, square, box, share)
            np.testing.assert_array_equal(soft.numpy(), g[f"{case}{prefix}_mask"], err_msg=f"{case}{prefix}")
            region = region_of(upstream.inside_box(soft, square, box), square, (frame.shape[1], frame.shape[0]))
            got = frame.clone()
            blend.paste(got.unbind(-1), face.permute(2, 0, 1), box, region)
            y0, y1, x0, x1 = g[f"{case}{prefix}_image_rect"].tolist()
            np.testing.assert_array_equal(got[y0:y1, x0:x1].numpy(), g[f"{case}{prefix}_image"], err_msg=str(case))
            rest = got.clone()
            rest[y0:y1, x0:x1] = frame[y0:y1, x0:x1]
            assert torch.equal(rest, frame)


def test_parser_input() -> None:
    g = golden("blend")
    for i, case in enumerate(g["cases"]):
        if f"{case}_parse_in512_every4" not in g:
            continue
        frame, box = t(g[f"frame_{g['frames'][i]}"]), Box(*g["boxes"][i].tolist())
        square = upstream.cut(frame, upstream.blend_square(box))
        if f"{case}_square_rgb" in g:
            np.testing.assert_array_equal(square.numpy()[..., ::-1], g[f"{case}_square_rgb"])  # golden frames are BGR
        got = imaging.pillow_resize(square, 512, 512)[::4, ::4].numpy()[..., ::-1]
        np.testing.assert_array_equal(got, g[f"{case}_parse_in512_every4"])


def test_labels_from_logits() -> None:
    """Rows that matter equal the plain way; a mask's lower half cannot tell the difference."""
    logits = torch.randn(2, 19, 64, 64, generator=torch.Generator().manual_seed(5)) * 3
    logits[:, 1] += 3
    plain = torch.nn.functional.interpolate(logits, size=512, mode="bilinear", align_corners=True).argmax(1).to(torch.uint8)
    got = mask.upsampled_labels(logits)
    assert float((got[:, mask.TOP_ROW :] != plain[:, mask.TOP_ROW :]).float().mean()) < 1e-5
    cut = plain.clone()
    cut[:, : mask.TOP_ROW] = 0
    for mode in ("jaw", "raw", "neck"):
        for box in (Box(100, 100, 300, 340), Box(5, 7, 400, 300)):
            square = upstream.blend_square(box)
            hard = [mask.label_mask(labels, mode)[0].to(torch.uint8) * 255 for labels in (plain, cut)]
            masks = [upstream.soft_mask(each, square, box) for each in hard]
            assert torch.equal(masks[0], masks[1])


@pytest.mark.parametrize("box", [Box(100, 60, 300, 340), Box(5, 7, 400, 300), Box(40, 30, 240, 90), Box(10, 10, 74, 74),
                                 Box(-30, 150, 120, 420), Box(20, 5, 276, 261), Box(0, 0, 480, 120), Box(8, 4, 520, 516)])
@pytest.mark.parametrize("side", [128, 256])
def test_rows_that_show(box: Box, side: int) -> None:
    """A face's rows above `first_row` leave no trace in the frame; those from the nearest tap on do."""
    random = torch.Generator().manual_seed(4)
    region = upstream.region(torch.full((512, 512), 255, dtype=torch.uint8), Place.of(box), (640, 480))
    region = Region(region.box, torch.full_like(region.mask, 255))  # the soft edge's first rows hardly show
    first = blend.first_row(Place.of(box), region, side)
    face, frame = (torch.randint(0, 256, shape, dtype=torch.uint8, generator=random)
                   for shape in ((3, side, side), (3, 480, 640)))

    def pasted(changed: int) -> torch.Tensor:
        other, out = face.clone(), frame.clone()
        other[:, :changed] ^= 255
        blend.paste(out.unbind(0), other, box, region)
        return out

    assert 0 < first < side
    assert torch.equal(pasted(first), pasted(0))
    assert not torch.equal(pasted(first + blend.ROW_REACH + 4), pasted(0))


# -- order -----------------------------------------------------------------------------------------------------------


def test_ping_pong_order() -> None:
    g = golden("order")
    for key in (k for k in g if k.endswith("_frame")):
        count = int(key.split("_")[0][1:])
        got = [order.source_index(i, count, "pingpong") for i in range(40)]
        assert got == g[key].tolist(), key
        if "noface" in key:  # upstream pairs later latents with the wrong frames; here they stay together
            assert got != g[key.replace("_frame", "_latent")].tolist()


def test_other_orders() -> None:
    assert [order.source_index(i, 3, "repeat") for i in range(7)] == [0, 1, 2, 0, 1, 2, 0]
    assert [order.source_index(i, 3, "hold") for i in range(5)] == [0, 1, 2, 2, 2]


@pytest.mark.parametrize("loop", ["pingpong", "repeat", "hold"])
@pytest.mark.parametrize(("count", "outputs"), [(1, 1), (1, 5), (3, 2), (3, 3), (3, 4), (3, 20), (5, 23)])
def test_runs_are_the_order(loop: Loop, count: int, outputs: int) -> None:
    """The first pass and the runs together show for every output the frame that the rule names, each run in one direction."""
    shown = list(range(min(count, outputs)))
    for run in order.runs(count, outputs, loop):
        assert run.output == len(shown)
        shown += [run.source + i * run.step for i in range(run.length)]
    assert shown == [order.source_index(i, count, loop) for i in range(outputs)]
