"""Weight files in every published form load strictly and safely; anything else is refused by name. Fetching, too."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import http.server
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from musetalk import LipSync, checkpoints
from musetalk.checkpoints import read_state
from musetalk.draw.generator import FaceGenerator
from musetalk.errors import BadCheckpoint
from musetalk.nets.tiny import Tiny, TinyConfig
from pipeline import weights
from tests.conftest import DEMO
from tests.fakes import loopback


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the demo weights without its manifest, so that files may be changed."""
    target = tmp_path / "weights"
    shutil.copytree(DEMO, target)
    (target / "manifest.json").unlink()
    return target


def speaks_alike(a: LipSync, b: LipSync) -> bool:
    side = a.nets.vae.cfg.crop_size // a.nets.vae.cfg.stride
    latents = torch.randn(1, 8, side, side, generator=torch.Generator().manual_seed(1))
    tokens = torch.randn(1, 50, a.nets.unet.cfg.cross_attention_dim, generator=torch.Generator().manual_seed(2))
    made, other = (FaceGenerator(each.nets)(latents, tokens)[0] for each in (a, b))
    return torch.equal(made, other)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], Any], **options: Any) -> None:
    torch.save(change(torch.load(path, weights_only=True)), path, **options)


UNET, VAE = "musetalkV15/unet.pth", "sd-vae/diffusion_pytorch_model.bin"
WHISPER, POSE = "whisper/pytorch_model.bin", "dwpose/dw-ll_ucoco_384.pth"


class Custom:
    """A class that an mmengine checkpoint might name; loading must not run it."""

    ran = False

    def __reduce__(self) -> Any:
        return (_mark, ("ran",))


def _mark(_: str) -> int:
    Custom.ran = True
    return 1


@pytest.mark.parametrize("form", ["older pickle", "newer attention names", "mmengine", "whisper decoder beside",
                                  "bare whisper"])
def test_published_forms_load(folder: Path, form: str) -> None:
    if form == "older pickle":
        for name in (UNET, WHISPER, "face-parse-bisent/79999_iter.pth", "s3fd-619a316812.pth"):
            rewrite(folder / name, lambda s: s, _use_new_zipfile_serialization=False)
    elif form == "newer attention names":
        names = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

        def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
            out = {}
            for key, value in state.items():
                for old, new in names.items():
                    key = key.replace(old, new)
                out[key] = value
            return out

        rewrite(folder / VAE, rename)
    elif form == "mmengine":
        rewrite(folder / POSE, lambda s: {
            "meta": {"x": Custom(), "date": collections.Counter(a=1)},
            "state_dict": collections.OrderedDict(s["state_dict"]),
            "message_hub": {"log": Custom()}, "ema_state_dict": {"steps": torch.zeros(1)}})
    elif form == "whisper decoder beside":
        rewrite(folder / WHISPER, lambda s: {**s, "model.decoder.x": torch.zeros(3), "proj_out.weight": torch.zeros(2)})
    else:
        rewrite(folder / WHISPER, lambda s: {k.removeprefix("model."): v for k, v in s.items()})
    Custom.ran = False
    assert speaks_alike(LipSync.load(folder), LipSync.load(DEMO))
    assert not Custom.ran, "code from the file was run"


def test_a_malicious_pickle_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self) -> Any:
            return (os.system, (f"touch {marker}",))

    path = tmp_path / "w.pth"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "x": Evil()}, path)
    assert torch.equal(read_state(path)["state_dict"]["a"], torch.zeros(1))
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(BadCheckpoint):
        read_state(tmp_path / "raw.pth")
    assert not marker.exists()


@pytest.mark.parametrize(("change", "words"), [
    (lambda s: {k: v for k, v in s.items() if k != "conv_out.bias"}, "key 'conv_out.bias' is missing"),
    (lambda s: {**s, "conv_out.bias": torch.zeros(9)}, r"key 'conv_out.bias' has shape \(9,\), expected \(4,\)"),
    (lambda s: {**s, "more": torch.zeros(1)}, "unknown key 'more'"),
    (lambda s: [1, 2], "holds a list"),
])
def test_wrong_contents_are_named(folder: Path, change: Any, words: str) -> None:
    rewrite(folder / UNET, change)
    with pytest.raises(BadCheckpoint, match=words) as e:
        LipSync.load(folder)
    assert "unet.pth" in str(e.value)
    assert "fetch" in str(e.value)


@pytest.mark.parametrize("name", [UNET, VAE, WHISPER, POSE, "s3fd-619a316812.pth"])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_truncated_files_are_named(folder: Path, name: str, share: float) -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(BadCheckpoint) as e:
        LipSync.load(folder)
    assert path.name in str(e.value)


def test_missing_files_and_configs_are_named(folder: Path) -> None:
    with pytest.raises(BadCheckpoint, match="no such folder"):
        LipSync.load(folder / "none")
    (folder / "sd-vae/config.json").write_text("{")
    with pytest.raises(BadCheckpoint, match=r"sd-vae/config\.json: not JSON"):
        LipSync.load(folder)
    (folder / "sd-vae/config.json").write_text('{"layers_per_block": "two"}')
    with pytest.raises(BadCheckpoint, match="layers_per_block"):
        LipSync.load(folder)
    (folder / UNET).unlink()
    with pytest.raises(BadCheckpoint, match=r"unet\.pth"):
        LipSync.load(folder)


def test_the_manifest_finds_one_changed_byte(tmp_path: Path) -> None:
    target = tmp_path / "weights"
    shutil.copytree(DEMO, target)
    assert checkpoints.verify(target) == checkpoints.verify(DEMO)
    path = target / VAE
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match="sha256"):
        LipSync.load(target)


def test_a_file_that_the_manifest_does_not_list_counts(tmp_path: Path) -> None:
    """A parser in the converted form wins: faces that the listed one prepared are other faces."""
    target = tmp_path / "weights"
    shutil.copytree(DEMO, target)
    parser = target / "face-parse-bisent"
    save_file({k: v + 1 for k, v in read_state(parser / "79999_iter.pth").items()}, parser / "model.safetensors")
    assert checkpoints.load(target).identity != checkpoints.load(DEMO).identity


@pytest.mark.parametrize("name", [POSE, "face-parse-bisent/79999_iter.pth", "s3fd-619a316812.pth"])
def test_weights_whose_nan_nobody_would_see_are_refused(folder: Path, name: str) -> None:
    """They would find no face, or make a film in which nothing was painted."""
    def spoilt(state: dict[str, Any]) -> dict[str, Any]:
        key = max(found := state.get("state_dict", state), key=lambda k: found[k].numel())
        found[key].view(-1)[-1] = torch.nan
        return state

    rewrite(folder / name, spoilt)
    with pytest.raises(BadCheckpoint, match=rf"{Path(name).name}: key '\S+' holds NaN"):
        LipSync.load(folder)


@pytest.mark.parametrize("name", [UNET, VAE, WHISPER, POSE, "face-parse-bisent/79999_iter.pth", "s3fd-619a316812.pth"])
def test_one_changed_byte_is_found_without_a_manifest(folder: Path, name: str) -> None:
    """In the largest tensor of each file; torch.load takes it without a word."""
    path = folder / name
    with zipfile.ZipFile(path) as archive:
        entry = max(archive.infolist(), key=lambda e: e.file_size)
    data = bytearray(path.read_bytes())
    data[entry.header_offset + 30 + len(entry.filename) + entry.file_size // 2] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)
    with pytest.raises(BadCheckpoint, match=f"{path.name}: damaged: its entry {entry.filename}"):
        LipSync.load(folder)
    with pytest.raises(BadCheckpoint, match=f"{path.name}: damaged"):
        weights.convert(folder, "v15")


def test_an_archive_without_crcs_loads(folder: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        rewrite(folder / UNET, lambda s: s)
    finally:
        torch.serialization.set_crc32_options(True)
    assert LipSync.load(folder)


@given(st.data())
@hypothesis_settings(max_examples=60, deadline=None)
def test_an_archive_with_any_changed_byte_is_whole_or_refused(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Headers and directory, too: never another error, and never other numbers."""
    path = tmp_path_factory.mktemp("w") / "w.pth"
    torch.save({"a": torch.arange(300.0), "b": torch.ones(7)}, path)
    whole = bytearray(path.read_bytes())
    whole[data.draw(st.integers(0, len(whole) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(whole)
    try:
        checkpoints.check_archive(path)
        state = read_state(path)
    except BadCheckpoint:
        return
    assert state.keys() == {"a", "b"}
    assert torch.equal(state["a"], torch.arange(300.0))
    assert torch.equal(state["b"], torch.ones(7))


def test_an_archive_that_says_it_lies_on_several_disks_is_whole_or_refused(tmp_path: Path) -> None:
    """zipfile.is_zipfile raises BadZipFile on it, in place of an answer."""
    path = tmp_path / "w.pth"
    torch.save({"a": torch.arange(300.0)}, path)
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x06\x07") + 16] = 2  # the ZIP64 locator's number of disks
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=r"w.pth: damaged"):
        checkpoints.check_archive(path)


@pytest.mark.parametrize("form", ["diffusers", "original"])
def test_the_tiny_decoder_loads_in_both_published_layouts(folder: Path, form: str) -> None:
    shutil.rmtree(folder / "taesd", ignore_errors=True)
    assert LipSync.load(folder).nets.tiny is None, "it is optional"
    cfg = TinyConfig(decoder_block_out_channels=(16, 16, 16), num_decoder_blocks=(1, 1, 1))
    net = Tiny(cfg)
    (folder / "taesd").mkdir()
    (folder / "taesd/config.json").write_text(json.dumps(asdict(cfg)))
    state = net.state_dict()
    if form == "diffusers":
        save_file({**state, "encoder.layers.0.weight": torch.zeros(1)}, folder / "taesd/diffusion_pytorch_model.safetensors")
    else:
        names = [k.removeprefix("decoder.layers.").partition(".") for k in state]
        torch.save({f"{int(n) + 1}.{rest}": v for (n, _, rest), v in zip(names, state.values(), strict=True)},
                   folder / "taesd/taesd_decoder.pth")
    loaded = checkpoints.load(folder, dtype=torch.float32).tiny
    assert loaded is not None
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in state.items())
    (folder / "taesd/config.json").write_text(json.dumps(asdict(TinyConfig())))
    with pytest.raises(BadCheckpoint, match="taesd"):
        LipSync.load(folder)


def test_version_one_loads(folder: Path) -> None:
    (folder / "musetalk").mkdir()
    (folder / UNET).rename(folder / "musetalk/pytorch_model.bin")
    (folder / "musetalkV15/musetalk.json").rename(folder / "musetalk/musetalk.json")
    (folder / "sd-vae").rename(folder / "sd-vae-ft-mse")
    assert LipSync.load(folder).nets.version == "v1"


# -- fetching ----------------------------------------------------------------------------------------------------------


class Files(http.server.BaseHTTPRequestHandler):
    """Serves a folder with ranges; breaks off the first answer of each file named in `break_off`."""

    root = Path()
    break_off: set[str] = set()
    tamper: set[str] = set()
    ranges: list[str] = []

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        name = self.path.rsplit("/", 1)[-1]
        found = next((p for p in self.root.rglob(name) if p.parent == self.root or p.parent.name in self.path), None)
        if found is None:
            self.send_error(404)
            return
        data = found.read_bytes()
        if name in self.tamper:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = 0
        if value := self.headers.get("range"):
            self.ranges.append(name)
            start = int(value.removeprefix("bytes=").split("-")[0])
            if start >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(206 if value else 200)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if name in self.break_off:
            self.break_off.discard(name)
            self.wfile.write(data[start : start + len(data) // 2])
            self.connection.close()
            return
        self.wfile.write(data[start:])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Files]]:
    """The demo weights served as if they were the published ones."""
    Files.root, Files.break_off, Files.tamper, Files.ranges = DEMO, set(), set(), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"

    def published(version: str, mirrors: Any = None) -> list[weights.Published]:
        names = [p for part in checkpoints.PARTS["v15"] for p in (*part.files, *part.configs) if (DEMO / p).is_file()]
        return [weights.Published(n, f"{base}/{n}", (DEMO / n).stat().st_size, checkpoints.sha256(DEMO / n)) for n in names]

    monkeypatch.setattr(weights, "published", published)
    yield Files
    server.shutdown()
    server.server_close()


def test_fetch_resumes_converts_and_verifies(hub: type[Files], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.break_off = {"unet.pth", "79999_iter.pth"}
    earlier = tmp_path / "w" / f"{VAE}.part"  # of a run that was ended
    earlier.parent.mkdir(parents=True)
    earlier.write_bytes((DEMO / VAE).read_bytes()[:1000])
    arguments = ["fetch", "--dir", str(tmp_path / "w")]
    assert weights.main(arguments) == 0
    assert set(hub.ranges) == {"unet.pth", "79999_iter.pth", Path(VAE).name}, "broken downloads continue where they stopped"
    assert json.loads(capsys.readouterr().out)["version"] == "v15"
    assert not list((tmp_path / "w").rglob("*.part"))
    assert not list((tmp_path / "w").rglob("*.pth")), "only the converted files stay"
    assert speaks_alike(LipSync.load(tmp_path / "w"), LipSync.load(DEMO))
    assert weights.main(["verify", "--dir", str(tmp_path / "w")]) == 0
    hub.ranges.clear()
    assert weights.main(arguments) == 0, "a second fetch finds everything there"


@pytest.mark.parametrize("have", ["all", "more", "breaks off"])
def test_a_file_of_unknown_size_comes_whole(hub: type[Files], tmp_path: Path, have: str) -> None:
    """A run that ended before the file had its new name: the host answers 416 to a range that begins at the end."""
    published = next(f for f in weights.published("v15") if f.path == UNET)
    part, whole = tmp_path / f"{UNET}.part", (DEMO / UNET).read_bytes()
    if have == "breaks off":
        hub.break_off = {Path(UNET).name}
    else:
        part.parent.mkdir(parents=True)
        part.write_bytes(whole + (b"of another file" if have == "more" else b""))
    weights.download(dataclasses.replace(published, size=0, sha256=""), tmp_path, lambda count: None)
    assert (tmp_path / UNET).read_bytes() == whole
    assert not part.exists()


def test_tampered_downloads_are_refused(hub: type[Files], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hub.tamper = {"79999_iter.pth"}
    assert weights.main(["fetch", "--dir", str(tmp_path)]) == 1
    assert "79999_iter.pth: sha256" in capsys.readouterr().err
    assert not (tmp_path / "face-parse-bisent/79999_iter.pth").exists()


def test_what_went_wrong_is_said(hub: type[Files], tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "TRIES", 1)
    hub.root = tmp_path
    assert weights.main(["fetch", "--dir", str(tmp_path / "w")]) == 1
    assert "404" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert weights.main(["fetch", "--dir", str(tmp_path / "file" / "w")]) == 1
    assert "Not a directory" in capsys.readouterr().err


def test_ctrl_c_ends_all_downloads_and_keeps_what_has_come(tmp_path: Path) -> None:
    class Endless(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1000))
                    time.sleep(0.05)

    server = loopback.Server(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [sys.executable, "-m", "pipeline.weights", "fetch", "--dir", str(tmp_path / "w"), "--mirror",
               f"https://=http://127.0.0.1:{server.server_port}/"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True,  # a background shell lets its children ignore SIGINT
                          preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)) as fetching:
        try:
            while not [p for p in tmp_path.rglob("*.part") if p.stat().st_size]:
                assert fetching.poll() is None
                time.sleep(0.1)
            fetching.send_signal(signal.SIGINT)
            _, said = fetching.communicate(timeout=30)
        finally:
            fetching.kill()
            server.shutdown()
            server.server_close()
    assert fetching.returncode == 130
    assert said.splitlines()[-1] == "error: interrupted; what has come stays, and the next call goes on from there"
    assert [p for p in tmp_path.rglob("*.part") if p.stat().st_size]


def test_the_old_command_names_the_new_one() -> None:
    done = subprocess.run([sys.executable, "-m", "musetalk.checkpoints", "fetch", "--dir", "x"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["weights are fetched, verified and converted by: python -m pipeline.weights"]


def test_published_list_matches_the_reference_table() -> None:
    rows = (Path(__file__).parent / "names_shapes" / "published_files.tsv").read_text().splitlines()[1:]
    table = {r.split("\t")[0]: r.split("\t")[1:3] for r in rows}
    for file in weights.published("v15"):
        if not file.size:
            continue  # not pinned
        size, digest = table[file.path]
        assert file.size == int(size)
        assert not digest or digest == file.sha256
    assert weights.published("v15", {"https://huggingface.co": "http://mirror"})[0].url.startswith("http://mirror/")



def test_a_mirror_without_its_other_half_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        weights.main(["verify", "--dir", str(tmp_path), "--mirror", "http://mirror"])
    assert "--mirror http://mirror: give FROM=TO" in capsys.readouterr().err
