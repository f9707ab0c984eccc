"""Results in a folder: attempts at once, links, names that lead elsewhere, and what dead workers left."""

from __future__ import annotations

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline.errors import JobError, StorageRejected
from pipeline.job.control import Control
from pipeline.transfer.storage import LocalStorage


def test_local_storage(tmp_path: Path, movie: Path) -> None:
    url = LocalStorage(tmp_path / "out").upload(movie, "job-1.mp4", Control(60))
    assert url == (tmp_path / "out" / "job-1.mp4").as_uri()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["job-1.mp4"]
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(JobError) as e:
        LocalStorage(blocked).upload(movie, "job-1.mp4", Control(60))
    assert not e.value.retryable


def test_two_attempts_of_one_id_at_once_both_succeed(tmp_path: Path) -> None:
    """Whoever looks at any time sees one whole film."""
    films, folder = [tmp_path / name for name in ("a", "b")], tmp_path / "out"
    for film in films:
        film.write_bytes(film.name.encode() * 20_000_000)
    storage, target = LocalStorage(folder), folder / "job-1.mp4"
    with ThreadPoolExecutor(2) as pool:
        attempts = [pool.submit(storage.upload, film, "job-1.mp4", Control(60)) for film in films * 4]
        while not all(a.done() for a in attempts):
            if target.exists():
                data = target.read_bytes()
                assert data in (film.read_bytes() for film in films), "half a film, or two in one"
        assert {a.result() for a in attempts} == {target.as_uri()}
    assert [p.name for p in folder.iterdir()] == ["job-1.mp4"]


def test_links_in_the_storage_folder_are_not_written_through(tmp_path: Path, movie: Path) -> None:
    folder, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (elsewhere / "precious").write_text("precious")
    (folder / "job-1.mp4").symlink_to(elsewhere / "precious")
    (folder / "job-2").symlink_to(elsewhere)
    (tmp_path / "link").symlink_to(folder)
    url = LocalStorage(tmp_path / "link").upload(movie, "job-1.mp4", Control(60))
    assert url == (folder / "job-1.mp4").as_uri()
    assert not (folder / "job-1.mp4").is_symlink()
    assert (folder / "job-1.mp4").read_bytes() == movie.read_bytes()
    with pytest.raises(StorageRejected):
        LocalStorage(folder).upload(movie, "job-2/part.mp4", Control(60))
    assert [p.name for p in elsewhere.iterdir()] == ["precious"]
    assert (elsewhere / "precious").read_text() == "precious"


@pytest.mark.parametrize("key", ["../job.mp4", "a/../../job.mp4", "/job.mp4", ".", "a//b.mp4", ""])
def test_no_key_leaves_the_folder(tmp_path: Path, movie: Path, key: str) -> None:
    with pytest.raises(StorageRejected):
        LocalStorage(tmp_path / "out").upload(movie, key, Control(60))
    assert {p.name for p in tmp_path.rglob("*.mp4")} == {movie.name}


def test_what_dead_workers_left_is_removed_at_the_start(tmp_path: Path, movie: Path) -> None:
    LocalStorage(tmp_path).upload(movie, "job-1/seg.mp4", Control(60))
    for name in (".musetalk-old.part", ".musetalk-busy.part", ".musetalk-new.part", "job-1/.musetalk-old.part",
                 ".foreign.part"):
        (tmp_path / name).write_bytes(b"half")
        if "new" not in name:
            os.utime(tmp_path / name, (1, 1))
    with (tmp_path / ".musetalk-busy.part").open() as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        LocalStorage(tmp_path).check()
    assert {p.name for p in tmp_path.rglob("*.part")} == {".musetalk-busy.part", ".musetalk-new.part", ".foreign.part"}
