"""What films say about their making, read back with tools that are not ours: exiftool, ffmpeg and c2pa's own reader."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import c2pa
import imageio_ffmpeg
import pytest

from benchmarks.signing import large_film
from pipeline import provenance
from pipeline.job.control import Control
from pipeline.job.metrics import PeakMemory
from pipeline.mark.marker import COMPOSITE, DESCRIPTION, Making, Marker, tags
from pipeline.settings import BadSetting, Settings
from pipeline.transfer.storage import storage_of
from scripts.make_test_certificate import make
from tests.fakes import b2 as fakes
from tests.fakes.tsa import Authority

SAMPLES = Path(__file__).parent.parent / "samples"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make(tmp_path_factory.mktemp("certificate"))


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished film as the encoder leaves it, with its tags."""
    path = tmp_path_factory.mktemp("encoded") / "output.mp4"
    ffmpeg("-i", str(SAMPLES / "presenter.mp4"), "-i", str(SAMPLES / "speech.wav"), "-map", "0:v", "-map", "1:a",
           "-c:v", "copy", "-shortest", *tags(Settings.from_env({})), "-movflags", "+faststart", str(path))
    return path


@pytest.fixture(scope="module")
def before(encoded: Path) -> str:
    """Digests of all its pictures and sound."""
    return frames(encoded)


@pytest.fixture
def film(encoded: Path, tmp_path: Path) -> Path:
    """That film, for a test to change."""
    return Path(shutil.copy(encoded, tmp_path))


def ffmpeg(*arguments: str) -> str:
    """Run the packaged ffmpeg; returns what it says."""
    done = subprocess.run([imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-y", *arguments], capture_output=True, text=True)
    return done.stderr


def settings(pair: tuple[Path, Path] | None = None, **changes: str) -> Settings:
    signing = {"C2PA_CERT": str(pair[0]), "C2PA_KEY": str(pair[1])} if pair else {}
    return Settings.from_env({**signing, **changes})


def making(clip: Path = SAMPLES / "presenter.mp4", speech: Path = SAMPLES / "speech.wav") -> Making:
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (clip, speech)]
    return Making("job-1", "v15", "0123456789abcdef0123", clip, digests[0], ((speech, digests[1]),))


def credentials(path: Path, kind: str = "video/mp4") -> dict[str, Any]:
    """The active manifest and the validation, by c2pa's reader."""
    with path.open("rb") as file, c2pa.Reader(kind, file) as reader:
        store = json.loads(reader.json())
        return {"state": reader.get_validation_state(), "active": store["manifests"][store["active_manifest"]], **store}


def frames(path: Path) -> str:
    """Digests of all decoded pictures and sound."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), "-f", "streamhash", "-"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_exiftool_finds_the_iptc_mark(film: Path, before: str) -> None:
    tool = shutil.which("exiftool")
    if not tool:
        pytest.skip("exiftool (Debian: libimage-exiftool-perl) is not installed: the IPTC mark is not read by other software")
    mark = Marker(settings()).finish(film, making(), Control(60))
    said = json.loads(subprocess.run([tool, "-j", "-n", str(film)], capture_output=True, text=True, check=True).stdout)[0]
    assert said["DigitalSourceType"] == COMPOSITE
    assert said["AISystemUsed"] == "MuseTalk"
    assert said["AISystemVersionUsed"].startswith("v15")
    assert "Warning" not in said
    assert mark.written == "IPTC"
    assert frames(film) == before


def test_ffmpeg_shows_comment_and_description(film: Path) -> None:
    said = ffmpeg("-i", str(film))
    assert f"comment         : {DESCRIPTION}" in said
    assert COMPOSITE in next(line for line in said.splitlines() if "description " in line)


def test_the_label_can_be_switched_off(film: Path) -> None:
    before = film.read_bytes()
    off = settings(AI_LABEL="off")
    assert tags(off) == ()
    assert Marker(off).finish(film, making(), Control(60)).written == "none"
    assert film.read_bytes() == before


def test_a_signed_film_is_valid_and_plays(film: Path, before: str, pair: tuple[Path, Path]) -> None:
    mark = Marker(settings(pair, REVISION="revision-7")).finish(film, making(), Control(60))
    assert mark.written == "IPTC, C2PA"
    assert frames(film) == before
    found = credentials(film)
    assert found["state"] == "Valid"
    data = {a["label"]: a["data"] for a in found["active"]["assertions"]}
    opened, edited = data["c2pa.actions.v2"]["actions"]
    assert (opened["action"], edited["action"]) == ("c2pa.opened", "c2pa.edited")
    assert edited["digitalSourceType"] == COMPOSITE
    assert {k: edited["softwareAgent"][k] for k in ("name", "version")} == {"name": "MuseTalk", "version": "v15"}
    generator = found["active"]["claim_generator_info"][0]
    assert (generator["name"], generator["version"]) == ("MuseTalk worker", "revision-7")
    assert data["org.musetalk.job"]["job_id"] == "job-1"
    assert data["org.musetalk.job"]["weights"] == "0123456789abcdef0123"
    assert data["org.musetalk.job"]["sources"]["speech"]["sha256"] == making().speeches[0][1]
    assert [(i["title"], i["relationship"]) for i in found["active"]["ingredients"]] == [
        ("source clip", "parentOf"), ("speech", "componentOf")]
    assert [p.name for p in film.parent.iterdir()] == ["output.mp4"]


def test_every_speech_is_an_ingredient(film: Path, pair: tuple[Path, Path]) -> None:
    """And the edit names all of them."""
    Marker(settings(pair)).finish(film, replace(making(), speeches=making().speeches * 2), Control(60))
    found = credentials(film)
    assert found["state"] == "Valid"
    assert [i["title"] for i in found["active"]["ingredients"]] == ["source clip", "speech", "speech 2"]
    data = {a["label"]: a["data"] for a in found["active"]["assertions"]}
    assert len(data["c2pa.actions.v2"]["actions"][1]["parameters"]["ingredients"]) == 2
    assert set(data["org.musetalk.job"]["sources"]) == {"clip", "speech", "speech-2"}


def middle_chunk(data: bytes, handler: bytes) -> int:
    """Where the middle chunk of a track of this kind (vide, soun) lies, by its stco box: flags, count, an offset each."""
    table = data.index(b"stco", data.index(b"hdlr" + bytes(8) + handler)) + 8
    (count,) = struct.unpack(">I", data[table : table + 4])
    at = table + 4 + 4 * (count // 2)
    return int(struct.unpack(">I", data[at : at + 4])[0])


@pytest.mark.parametrize("place", ["picture", "sound", "xmp"])
def test_one_changed_byte_is_detected(film: Path, before: str, pair: tuple[Path, Path], place: str) -> None:
    Marker(settings(pair)).finish(film, making(), Control(60))
    data = bytearray(film.read_bytes())
    at = {"picture": middle_chunk(data, b"vide") + 20, "sound": middle_chunk(data, b"soun") + 20,
          "xmp": data.rindex(b"AISystemUsed>MuseTalk") + 14}[place]
    data[at] ^= 1
    film.write_bytes(data)
    changed = [new[2] for old, new in zip(before.splitlines(), frames(film).splitlines(), strict=True) if old != new]
    assert changed == {"picture": ["v"], "sound": ["a"], "xmp": []}[place], "what a player shows and plays"
    found = credentials(film)
    assert found["state"] == "Invalid"
    assert "bmffHash.mismatch" in json.dumps(found["validation_results"]["activeManifest"]["failure"])
    assert provenance.read(film)["c2pa"]["state"].startswith("invalid: assertion.bmffHash.mismatch")


@pytest.mark.parametrize("state", ["valid", "invalid"])
def test_a_sources_credentials_are_kept(film: Path, tmp_path: Path, pair: tuple[Path, Path], state: str) -> None:
    """The clip was signed by somebody; what it said stays readable in the film, and whether it was true."""
    clip = tmp_path / "clip"
    clip.write_bytes((SAMPLES / "presenter.mp4").read_bytes())
    Marker(settings(pair)).finish(clip, making(), Control(60))
    label = credentials(clip)["active_manifest"]
    if state == "invalid":
        data = bytearray(clip.read_bytes())
        data[data.index(b"mdat") + 5000] ^= 1
        clip.write_bytes(data)
    Marker(settings(pair)).finish(film, making(clip), Control(60))
    found = credentials(film)
    assert found["state"] == "Valid"
    ingredient = found["active"]["ingredients"][0]
    assert ingredient["active_manifest"] == label
    assert label in found["manifests"]
    codes = json.dumps(ingredient["validation_results"]["activeManifest"]["failure"])
    assert ("bmffHash.mismatch" in codes) == (state == "invalid")
    assert provenance.read(film)["c2pa"]["ingredients"][0]["credentials"].startswith(state)
    stated = next(a["data"] for a in found["active"]["assertions"] if a["label"] == "org.musetalk.job")
    assert stated["sources"]["clip"]["credentials"].startswith(state)


FORMATS = {"clip.png": ("-frames:v", "1"), "clip.jpg": ("-frames:v", "1"), "clip.webp": ("-frames:v", "1"), "clip.mkv": (),
           "clip.mov": (), "clip.avi": (), "clip.gif": ("-t", "0.3"), "clip.ts": ()}


@pytest.mark.parametrize("name", FORMATS)
def test_a_clip_of_any_format_is_an_ingredient(film: Path, tmp_path: Path, pair: tuple[Path, Path], name: str) -> None:
    ffmpeg("-i", str(SAMPLES / "presenter.mp4"), "-t", "1", *FORMATS[name], str(tmp_path / name))
    Marker(settings(pair)).finish(film, making(tmp_path / name), Control(60))
    found = credentials(film)
    assert found["state"] == "Valid"
    assert {i["title"] for i in found["active"]["ingredients"]} == {"source clip", "speech"}


@pytest.mark.parametrize("name", ["s.mp3", "s.webm", "s.flac", "s.ogg", "s.m4a"])
def test_a_speech_of_any_format_is_an_ingredient(film: Path, tmp_path: Path, pair: tuple[Path, Path], name: str) -> None:
    ffmpeg("-i", str(SAMPLES / "speech.wav"), str(tmp_path / name))
    Marker(settings(pair)).finish(film, making(speech=tmp_path / name), Control(60))
    assert {i["title"] for i in credentials(film)["active"]["ingredients"]} == {"source clip", "speech"}


def test_a_damaged_source_still_is_an_ingredient(film: Path, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    clip = tmp_path / "clip"
    clip.write_bytes((SAMPLES / "presenter.mp4").read_bytes()[:3000])
    Marker(settings(pair)).finish(film, making(clip), Control(60))
    assert {i["title"] for i in credentials(film)["active"]["ingredients"]} == {"source clip", "speech"}


def test_no_source_makes_the_worker_call_out(film: Path, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """A clip may name an address where its manifest lies: within the operator's network, if it likes."""
    with Authority() as listener:
        clip = tmp_path / "clip.jpg"
        still = tmp_path / "still.jpg"
        ffmpeg("-i", str(SAMPLES / "still.png"), str(still))
        signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo("es256", pair[0].read_bytes(), pair[1].read_bytes(), None))
        with c2pa.Builder(json.dumps({"assertions": []})) as builder:
            builder.set_intent(c2pa.C2paBuilderIntent.CREATE, c2pa.C2paDigitalSourceType.DIGITAL_CREATION)
            builder.set_no_embed()
            builder.set_remote_url(listener.url)
            builder.sign_file(still, clip, signer)
        with contextlib.suppress(c2pa.C2paError):
            c2pa.Reader(str(clip))
        assert listener.asked, "the clip names the address"
        listener.asked = 0
        Marker(settings(pair)).finish(film, making(clip), Control(60))
        provenance.read(clip)
        assert listener.asked == 0
        assert {i["title"] for i in credentials(film)["active"]["ingredients"]} == {"source clip", "speech"}


@pytest.mark.parametrize("fault", ["expired", "other key", "no pem", "no file", "ca", "key only", "label off"])
def test_a_wrong_signer_stops_the_worker(tmp_path: Path, pair: tuple[Path, Path], fault: str) -> None:
    chain, key = make(tmp_path / "new", days=(-20, -1) if fault == "expired" else (-1, 10))
    variables = {"C2PA_CERT": str(chain), "C2PA_KEY": str(key)} | {
        "expired": {}, "other key": {"C2PA_KEY": str(pair[1])}, "no pem": {"C2PA_CERT": str(SAMPLES / "still.png")},
        "no file": {"C2PA_KEY": str(tmp_path / "nothing.pem")}, "key only": {"C2PA_CERT": ""},
        "ca": {"C2PA_CERT": str(tmp_path / "new" / "root.pem")}, "label off": {"AI_LABEL": "off"}}[fault]
    with pytest.raises(BadSetting) as e:
        Marker(Settings.from_env(variables))
    assert "\n" not in str(e.value)
    assert {"expired": "is valid from", "other key": "does not belong", "no pem": "holds no certificate",
            "no file": "neither PEM text nor a file", "ca": "does not belong", "key only": "belong together",
            "label off": "AI_LABEL=off"}[fault] in str(e.value)
    door = subprocess.run([sys.executable, "handler.py"], capture_output=True, text=True, cwd=SAMPLES.parent,
                          env={**os.environ, **variables})
    assert door.returncode == 1
    assert door.stderr.strip().splitlines()[-1] == f"musetalk-worker: {e.value}"


def test_pem_text_serves_as_well(film: Path, pair: tuple[Path, Path]) -> None:
    chosen = settings(C2PA_CERT=pair[0].read_text(), C2PA_KEY=pair[1].read_text().replace("\n", "\\n"))
    assert Marker(chosen).finish(film, making(), Control(60)).written == "IPTC, C2PA"
    assert chosen.c2pa_key in chosen.secrets()


@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
def test_a_rerun_is_one_object(tmp_path: Path, film: Path, pair: tuple[Path, Path], parts: bool) -> None:
    """Two runs sign the same film: other bytes, one object. Another certificate, or none, is another object."""
    server, original = fakes.B2(part_size=5_000_000), (large_film(film, 11) if parts else film).read_bytes()
    key = "avatar/outputs/job-1.mp4"

    def job(**changes: str) -> bytes:
        film.write_bytes(original)
        chosen = Settings.from_env({**server.environment(), "C2PA_CERT": str(pair[0]), "C2PA_KEY": str(pair[1]), **changes})
        mark = Marker(chosen).finish(film, making(), Control(60))
        storage_of(chosen).upload(film, "job-1.mp4", Control(60), digest=mark.digest)
        return film.read_bytes()

    try:
        assert job() != job()
        assert len(server.objects[key]) == 1
        assert ("b2_finish_large_file" in server.calls) == parts
        chain, other = make(tmp_path / "other")
        job(C2PA_CERT=str(chain), C2PA_KEY=str(other))
        assert len(server.objects[key]) == 2
        job(C2PA_CERT="", C2PA_KEY="")
        assert len(server.objects[key]) == 3
    finally:
        server.close()


def test_detection(film: Path, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert provenance.main([str(SAMPLES / "speech.wav")]) == 3
    assert provenance.main([str(film.with_name("nothing.mp4"))]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    Marker(settings(pair)).finish(film, making(), Control(60))
    assert provenance.main([str(film)]) == 0
    assert "signed by Test signer" in capsys.readouterr().out
    assert provenance.main([str(film), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["marked"]
    assert found["iptc"]["digital_source_type"] == COMPOSITE
    assert found["c2pa"]["state"] == "valid"
    assert found["c2pa"]["job"]["job_id"] == "job-1"


@pytest.mark.full
def test_a_large_film_is_signed_in_little_memory(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """100 MB: c2pa would hold the film twice."""
    film = large_film(tmp_path / "output.mp4", 100)
    marker = Marker(settings(pair))
    with PeakMemory() as memory:
        before = memory.peak_kb or 0
        marker.finish(film, making(), Control(60))
    assert (memory.peak_kb or 0) - before < 50_000, "the signer's own program takes two thirds of that"
    assert credentials(film)["state"] == "Valid"
