"""The streaming engine on the demo weights: lengths, order, untouched pixels, reuse, stopping, faults of model and device."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from musetalk import AvatarCache, LipSync, Options, checkpoints
from musetalk.draw.generator import FaceGenerator
from musetalk.pixels.colour import Colour, Planes, from_rgb, to_rgb
from musetalk.show.blend import paste
from pipeline.ffmpeg import probe
from pipeline.film import engine
from pipeline.job.control import Control
from pipeline.job.metrics import children
from pipeline.media import FrameReader, FrameSource
from pipeline.run import Service, job_folder, remove_stale
from pipeline.settings import Settings
from tests.conftest import SAMPLES, encoded, failing, temporary_files

Make = Callable[..., Path]


def run(service: Service, video: Path, audio: Path, job_id: str = "engine", **changes: Any) -> dict[str, Any]:
    return service.run_job({"musetalk_job_id": job_id, "video_url": str(video), "audio_url": str(audio), **changes})


def decode(path: Path, fps: Fraction = Fraction(25)) -> np.ndarray:
    """All frames of a file, (N, H * W * 3 / 2)."""
    info = probe(path, 10**7)
    assert info.video
    source = FrameSource(info, info.video.width, info.video.height, fps, (), 10**7)
    reader, out = FrameReader(source), []
    while reader.read_into(buffer := np.empty(source.frame_bytes, np.uint8)):
        out.append(buffer)
    reader.close()
    return np.stack(out)


def output(body: dict[str, Any]) -> Path:
    assert body["status"] == "success", body
    return Path(body["output_url"].removeprefix("file://"))


@pytest.fixture
def written() -> Iterator[list[np.ndarray]]:
    """Every frame as it reaches the encoder."""
    with encoded() as frames:
        yield frames


def another(service: Service, **changes: Any) -> Service:
    """A service on the same networks, whose cache, batch or lost device does not stay with the others."""
    other = Service(service.settings.model_copy(update=changes))
    other.engine._lipsync = LipSync(service.engine.load().nets)
    return other


def test_output_is_as_long_as_the_speech(service: Service, short_clip: Path, short_speech: Path) -> None:
    body = run(service, short_clip, short_speech)
    info = probe(output(body), 10**7)
    assert body["metrics"]["frames"] == 40
    assert info.duration == pytest.approx(1.6, abs=0.05)
    assert len(decode(output(body))) == 40


@pytest.mark.parametrize(("loop", "order"), [
    ("pingpong", [*range(25), *range(24, 9, -1)]), ("repeat", [*range(25), *range(15)]),
    ("hold", [*range(25), *[24] * 15]),
])
def test_loops_and_untouched_pixels(
    service: Service, short_clip: Path, short_speech: Path, written: list[np.ndarray], loop: str, order: list[int]
) -> None:
    """Outside the face box every frame is its source's exact planes, forwards and backwards."""
    run(service, short_clip, short_speech, params={"loop": loop})
    source = decode(short_clip)
    assert len(source) == 25
    assert len(written) == len(order)
    width, height = 640, 360
    changed = 0
    for frame, i in zip(written, order, strict=True):
        got, want = (x[: width * height].reshape(height, width) for x in (frame, source[i]))
        different = np.argwhere(got != want)
        changed += len(different)
        if len(different):
            (top, left), (bottom, right) = different.min(0), different.max(0)
            assert top > 120
            assert bottom < 300
            assert left > 200
            assert right < 440
    assert changed > 1000 * len(order), "the mouth was painted"


def test_a_still_image_speaks(service: Service, short_speech: Path) -> None:
    body = run(service, SAMPLES / "still.png", short_speech, resolution="480p")
    assert len(decode(output(body))) == 40


def test_shape_and_rate(service: Service, short_clip: Path, short_speech: Path) -> None:
    body = run(service, short_clip, short_speech, aspect_ratio="1:1", resolution="240p",
               params={"fit": "crop", "fps": 29.97})
    info = probe(output(body), 10**7)
    assert info.video
    assert (info.video.width, info.video.height) == (240, 240)
    assert info.video.fps == pytest.approx(29.97, abs=0.01)
    assert body["metrics"]["frames"] == 48


def test_frames_without_a_face_pass_through(
    service: Service, short_clip: Path, short_speech: Path, media: Make, written: list[np.ndarray]
) -> None:
    path = media("leaves.mp4", "-i", str(short_clip), "-f", "lavfi", "-i", "color=gray:s=640x360:r=25:d=0.4",
                 "-filter_complex", "[0:v]trim=0:0.6,setpts=PTS-STARTPTS[a];[a][1:v]concat=n=2", "-c:v", "libx264",
                 "-crf", "16")
    assert len(decode(path)) == 25
    run(service, path, short_speech)
    source = decode(path)
    for i in range(16, 25):
        np.testing.assert_array_equal(written[i], source[i])
    assert any((written[i] != source[i]).any() for i in range(16))


def test_no_face_at_all_is_named(service: Service, short_speech: Path, media: Make) -> None:
    path = media("nobody.mp4", "-f", "lavfi", "-i", "testsrc2=s=640x360:r=25:d=1", "-c:v", "libx264")
    body = run(service, path, short_speech)
    assert (body["error_type"], body["stage"], body["details"]["reason"]) == ("media_error", "preprocessing", "no_face")
    assert "video_url" in body["error_message"]


def test_the_second_job_prepares_nothing_and_gives_the_same_bytes(
    service: Service, short_clip: Path, word: Path, written: list[np.ndarray], tmp_path: Path
) -> None:
    service = another(service)
    service.engine.cache = AvatarCache(tmp_path, 10**9, memory=0)
    first = run(service, short_clip, word)
    fresh, written[:] = list(written), []
    second = run(service, short_clip, word)
    assert (first["metrics"]["avatar_cached"], second["metrics"]["avatar_cached"]) == (False, True)
    assert all(np.array_equal(a, b) for a, b in zip(fresh, written, strict=True))
    file = next(tmp_path.glob("*.avatar"))
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    written.clear()
    third = run(service, short_clip, word)
    assert third["metrics"]["avatar_cached"] is False, "a damaged entry is rebuilt"
    assert all(np.array_equal(a, b) for a, b in zip(fresh, written, strict=True))


def test_parameters_do_something(
    service: Service, short_clip: Path, short_speech: Path, word: Path, written: list[np.ndarray]
) -> None:
    def frames(speech: Path, **params: Any) -> np.ndarray:
        written.clear()
        run(service, short_clip, speech, params=params)
        return np.stack(written)

    paused = frames(short_speech)
    for silence in ("rest", "model"):
        assert (frames(short_speech, silence=silence) != paused).any(), silence
    base, seeded = frames(word), frames(word, seed=5)
    for params in ({"parsing_mode": "raw"}, {"extra_margin": 30}, {"left_cheek_width": 20}, {"openness": 1.5},
                   {"audio_padding_left": 4, "audio_padding_right": 0}):
        assert (frames(word, **params) != base).any(), params
    assert np.abs(frames(word, batch_size=3).astype(int) - base).mean() < 0.02, "the batch size only rounds differently"
    assert (seeded != base).any()
    assert (seeded == frames(word, seed=5)).all()


def test_bbox_shift_needs_the_older_weights(service: Service, short_clip: Path, short_speech: Path) -> None:
    body = run(service, short_clip, short_speech, params={"bbox_shift": 5})
    assert body["details"]["field"] == "params.bbox_shift"


# -- colour ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("colour", [Colour("bt709"), Colour("bt601"), Colour("bt2020", True)])
def test_colour_round_trip(colour: Colour) -> None:
    from musetalk.geometry.box import Box, Region

    generator = torch.Generator().manual_seed(1)
    buffer = torch.randint(60, 190, (64 * 48 * 3 // 2,), dtype=torch.uint8, generator=generator)
    planes, before = Planes.of(buffer, 64, 48), buffer.clone()
    face = from_rgb(torch.full((1, 16, 16, 3), 200, dtype=torch.uint8), colour)[0]
    empty = Region(Box(8, 8, 40, 40), torch.zeros(32, 32, dtype=torch.uint8))
    paste(planes, face, Box(8, 8, 40, 40), empty)
    assert torch.equal(buffer, before), "an empty mask changes nothing"
    paste(planes, face, Box(8, 8, 40, 40), Region(empty.box, torch.full_like(empty.mask, 255)))
    inner = to_rgb(planes, colour)[10:38, 10:38].float()
    assert float((inner - 200).abs().mean()) < 12, "the colour arrives, but for chroma's subsampling"
    rest = Planes.of(buffer, 64, 48).y.clone()
    rest[8:40, 8:40] = Planes.of(before, 64, 48).y[8:40, 8:40]
    assert torch.equal(rest, Planes.of(before, 64, 48).y)


def test_blending_planes_equals_blending_rgb(service: Service) -> None:
    """The streaming path against the library's exact RGB path on one real frame: a level or two of rounding."""
    lipsync, colour = service.engine.load(), Colour()
    buffer = torch.from_numpy(decode(SAMPLES / "presenter.mp4")[0].copy())
    frame = to_rgb(Planes.of(buffer, 1280, 720), colour)
    avatar = lipsync.prepare([frame])
    entry = avatar[0]
    assert entry
    prompts = lipsync.prompts(np.zeros(16000, np.float32), Fraction(25))
    made, _ = FaceGenerator(lipsync.nets)(entry.latents[None], prompts.batch([0]))
    face = made[0].flip(0)  # upside down: nothing matches by chance
    want = frame.clone()
    paste(want.unbind(-1), face.permute(2, 0, 1), entry.place.box(), entry.region)
    planes = Planes.of(buffer, 1280, 720)
    paste(planes, from_rgb(face[None], colour)[0], entry.place.box(), entry.region)
    luma = (want.float() @ torch.tensor([0.2126, 0.7152, 0.0722])) * (219 / 255) + 16
    difference = (planes.y.float() - luma).abs()
    changed = (want != frame).any(-1)
    print(f"luma: mean {float(difference[changed].mean()):.3f}, max {float(difference.max()):.1f} levels")
    assert float(difference[changed].mean()) < 0.6
    assert float(difference.max()) <= 8, "where the source leaves RGB's gamut"
    rgb = (to_rgb(planes, colour).float() - want.float()).abs()[changed]
    assert float(rgb.mean()) < 2.5, "but for chroma's subsampling"


# -- stopping ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_leftovers(tmp_path: Path) -> Iterator[None]:
    before = {t.ident for t in threading.enumerate()}
    with temporary_files(tmp_path):
        yield
    until = time.monotonic() + 5  # a loaded machine takes its time to bury a child
    while (left := _left(before, tmp_path)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not left


def _left(before: set[int | None], folder: Path) -> list[str]:
    """Threads, folders and ffmpegs of a job that has ended."""
    threads = [t.name for t in threading.enumerate() if t.ident not in before and t.name in ("decode", "encode", "peak-memory")]
    names = [Path(f"/proc/{c}/comm").read_text() for c in children() if Path(f"/proc/{c}/comm").exists()]
    return [*threads, *map(str, folder.glob("musetalk-job-*")), *(n for n in names if "ffmpeg" in n)]


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("after", [0.0, 0.2, 0.6, 1.2])
def test_cancel_stops_promptly_and_leaves_nothing(service: Service, media: Make, after: float) -> None:
    speech = media("minute.wav", "-f", "lavfi", "-i", "sine=200:d=60")
    control = Control(120)
    threading.Timer(after, control.cancel).start()
    began = time.monotonic()
    body = service.run_job({"musetalk_job_id": "c", "video_url": str(SAMPLES / "presenter.mp4"), "audio_url": str(speech)},
                           control=control)
    assert body["error_message"] == "the job was cancelled"
    assert body["retryable"] is True
    assert time.monotonic() - began < after + 6


def test_a_stopped_job_stops_no_other_that_shares_its_networks(
    service: Service, settings: Settings, short_clip: Path, short_speech: Path, media: Make
) -> None:
    speech, other = media("minute.wav", "-f", "lavfi", "-i", "sine=200:d=60"), Service(settings)
    other.engine._lipsync = service.engine.load()
    control = Control(120, lambda stage, share: control.cancel() if stage == "inference" and share > 0 else None)
    request = {"musetalk_job_id": "s", "video_url": str(SAMPLES / "presenter.mp4"), "audio_url": str(speech)}
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(other.run_job, request, control=control)
        while not stopped.done():  # a job at every moment of the other one's end
            output(run(service, short_clip, short_speech, params={"seed": time.monotonic_ns() % 10**9}))
    body = stopped.result()
    assert (body["status"], body["stage"], body["error_message"]) == ("failed", "inference", "the job was cancelled")


def test_a_job_that_waits_for_its_turn_can_be_cancelled(service: Service, short_clip: Path, short_speech: Path) -> None:
    control, done = Control(120, lambda stage, _: threading.Timer(0.3, control.cancel).start()), threading.Event()
    with service.engine.job():
        threading.Thread(target=lambda: (service.run_job(
            {"musetalk_job_id": "w", "video_url": str(short_clip), "audio_url": str(short_speech)}, control=control),
            done.set())).start()
        assert done.wait(20)


@pytest.mark.usefixtures("no_leftovers")
def test_deadline(service: Service, media: Make) -> None:
    speech = media("minute.wav", "-f", "lavfi", "-i", "sine=200:d=60")
    body = service.run_job({"musetalk_job_id": "d", "video_url": str(SAMPLES / "presenter.mp4"), "audio_url": str(speech)},
                           control=Control(1.5))
    assert "JOB_DEADLINE_SEC" in body["error_message"]
    assert (body["error_type"], body["retryable"]) == ("processing_error", True)


# -- model and device --------------------------------------------------------------------------------------------------


def test_out_of_memory_halves_the_batch(service: Service, short_clip: Path, short_speech: Path) -> None:
    """Injects the exception torch raises; the batch is halved until it fits."""
    fresh = another(service)
    with failing(fresh.engine.load().nets.unet, torch.OutOfMemoryError("CUDA out of memory"), above=2) as seen:
        assert run(fresh, short_clip, short_speech)["status"] == "success"
    assert max(seen) == 8
    assert seen[-1] <= 2


@pytest.mark.parametrize(("error", "leaf", "retryable"), [
    (torch.OutOfMemoryError("CUDA out of memory"), "processing_error", True),
    (MemoryError(), "processing_error", True),
    (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), "processing_error", True),
])
def test_device_errors_injected(
    service: Service, short_clip: Path, word: Path, error: BaseException, leaf: str, retryable: bool
) -> None:
    fresh = another(service)
    with failing(fresh.engine.load().nets.unet, error):
        body = run(fresh, short_clip, word)
    assert (body["error_type"], body["retryable"]) == (leaf, retryable)
    if isinstance(error, torch.OutOfMemoryError):
        assert body["details"]["is_oom"] is True
    again = run(fresh, short_clip, word)
    if isinstance(error, torch.AcceleratorError):
        assert fresh.unfit
        assert "replaced" in again["error_message"]
    else:
        assert again["status"] == "success"


def test_nan_is_an_error_not_a_black_video(service: Service, short_clip: Path, short_speech: Path) -> None:
    weight = service.engine.load().nets.vae.decoder.conv_out.bias
    saved = weight.clone()
    try:
        weight.fill_(float("nan"))
        body = run(service, short_clip, short_speech, params={"silence": "model"})
    finally:
        weight.copy_(saved)
    assert (body["error_type"], body["details"]["frame_number"]) == ("processing_error", 0)


def test_broken_weights_are_named(settings: Settings, tmp_path: Path, short_clip: Path, short_speech: Path) -> None:
    body = run(Service(settings.model_copy(update={"model_dir": tmp_path})), short_clip, short_speech)
    assert (body["error_type"], body["retryable"]) == ("processing_error", False)
    assert "musetalk" in body["error_message"]


def test_stale_folders_are_removed(tmp_path: Path) -> None:
    (tmp_path / "musetalk-job-old").mkdir()
    (tmp_path / "musetalk-job-old" / "video").write_bytes(b"x")
    with temporary_files(tmp_path), job_folder() as mine:
        assert remove_stale() == 1, "the one that nobody holds"
        assert list(tmp_path.iterdir()) == [mine]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_of_each_dtype_against_float32(dtype: torch.dtype, settings: Settings) -> None:
    nets = checkpoints.load(settings.model_dir, "cpu", torch.float32)
    other = checkpoints.load(settings.model_dir, "cpu", dtype)
    cfg = nets.vae.cfg
    side = cfg.crop_size // cfg.stride
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 8, side, side, generator=generator)
    tokens = torch.randn(2, 50, nets.unet.cfg.cross_attention_dim, generator=generator)
    want, got = (FaceGenerator(each)(latents, tokens)[0].int() for each in (nets, other))
    difference = (want - got).abs().float()
    print(f"{dtype}: mean {float(difference.mean()):.3f}, max {float(difference.max()):.0f} grey levels")
    assert float(difference.mean()) <= (0.01 if dtype == torch.float32 else 2.0)


def test_library_speaks(settings: Settings) -> None:
    """The few lines of the package's docstring."""
    lipsync = LipSync.load(settings.model_dir)
    source = decode(SAMPLES / "presenter.mp4")[:4]
    frames = [to_rgb(Planes.of(torch.from_numpy(f), 1280, 720), Colour()).numpy() for f in source]
    avatar = lipsync.prepare(frames)
    spoken = list(lipsync.speak(avatar, np.zeros(8000, np.float32), Fraction(24), Options(batch_size=5, silence="model")))
    assert len(spoken) == 12
    assert spoken[0].shape == (720, 1280, 3)
    assert (spoken[0] != frames[0]).any()


@pytest.mark.parametrize(("total_gb", "batch"), [(80, 16), (8, 16), (5, 8), (4.6, 4), (2, 1), (0.5, 1)])
def test_batch_follows_the_model_of_the_device(monkeypatch: pytest.MonkeyPatch, total_gb: float, batch: int) -> None:
    """What the device reports is simulated."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, int(total_gb * 2**30)))
    assert engine.batch_for(torch.device("cuda")) == batch
    assert engine.batch_for(torch.device("cpu")) == 8
