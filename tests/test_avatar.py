"""The avatar store and its cache: chunks, atomic files, eviction, damage, several writers."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from musetalk.avatar import CHUNK_FRAMES, Avatar, AvatarCache, Face, cache_key
from musetalk.geometry.box import Box, Region
from musetalk.geometry.place import Place


def face(i: int) -> Face:
    mask, latents = torch.full((4 + i % 3, 6), i % 256, dtype=torch.uint8), torch.full((8, 4, 4), float(i)).half()
    place, region = Place.turned(i + 0.25, i, i + 10, i + 12, -i / 64), Region(Box(i, 2, i + 6, 6 + i % 3), mask)
    return Face(place, region, latents, mask[:3, :3])


def filled(count: int) -> Avatar:
    avatar = Avatar.new()
    for i in range(count):
        avatar.append(None if i % 7 == 3 else face(i))
    avatar.finish()
    return avatar


def same(avatar: Avatar, count: int) -> bool:
    for i in range(count):
        got, want = avatar[i], None if i % 7 == 3 else face(i)
        if (got is None) != (want is None):
            return False
        if got and want:
            alike = torch.equal(got.region.mask, want.region.mask) and torch.equal(got.latents, want.latents)
            alike = alike and torch.equal(got.lips, want.lips)
            if (got.place, got.region.box) != (want.place, want.region.box) or not alike:
                return False
    return True


@pytest.mark.parametrize("count", [1, CHUNK_FRAMES - 1, CHUNK_FRAMES, 5 * CHUNK_FRAMES + 3])
def test_what_goes_in_comes_out(count: int, tmp_path: Path) -> None:
    avatar = filled(count)
    assert len(avatar) == count
    assert same(avatar, count)
    avatar.save(tmp_path / "a", "key")
    read = Avatar.open(tmp_path / "a", "key")
    assert read
    assert (len(read), read.complete, read.first_face) == (count, True, 0)
    assert same(read, count)


def test_entries_can_be_read_while_more_are_added() -> None:
    avatar = Avatar.new()
    for i in range(3 * CHUNK_FRAMES):
        avatar.append(face(i))
        for j in (0, i // 2, i):
            entry = avatar[j]
            assert entry
            assert entry.place == face(j).place
    with pytest.raises(IndexError):
        avatar[3 * CHUNK_FRAMES]


def test_the_latest_stay_in_memory(tmp_path: Path) -> None:
    assert AvatarCache(tmp_path, 10**9).put("a", filled(40))
    size = (tmp_path / "a-whole.avatar").stat().st_size
    cache = AvatarCache(tmp_path, 10**9, memory=int(2.5 * size))
    for key in "abac":  # a is read from the disk, then from memory; c pushes b out
        assert cache.get(key) or cache.put(key, filled(40))
    assert cache.put("d", filled(400)), "too large for memory, not for the disk"
    assert AvatarCache(tmp_path, 10**9).get("d")
    for path in tmp_path.iterdir():
        path.unlink()
    assert [key for key in "abcd" if cache.get(key)] == ["a", "c"]
    avatar = cache.get("a")
    assert avatar
    assert same(avatar, 40)


def test_memory_serves_where_no_disk_does(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = AvatarCache(tmp_path / "file" / "cache", 10**9)
    assert not cache.put("key", filled(3))
    assert cache.get("key")
    assert AvatarCache(tmp_path, 0).put("key", filled(3)) is False


def test_damage_and_foreign_files_are_misses(tmp_path: Path) -> None:
    cache = AvatarCache(tmp_path, 10**9, memory=0)
    assert cache.put("key", filled(50))
    assert cache.get("key")
    assert cache.get("other") is None
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    assert Avatar.open(path, "another key") is None
    for damage in (b"", whole[:-1], whole[: len(whole) // 2], whole[:100] + b"x" + whole[101:], b"\xff" * 64):
        path.write_bytes(damage)
        assert cache.get("key") is None
    at = whole.index(b'"present": "') + len(b'"present": "')
    for i in (*range(0, len(whole), 97), at, len(whole) - 40, len(whole) - 1):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :])
        assert cache.get("key") is None, i
    path.write_bytes(whole)
    assert cache.get("key")


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    AvatarCache(tmp_path, 10**9).put("key", filled(50))
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert AvatarCache(tmp_path, 10**9).put("key", filled(50))
    assert AvatarCache(tmp_path, 10**9).get("key"), "another worker finds it"


def test_one_thread_may_add_while_another_reads() -> None:
    avatar, stop, wrong = Avatar.new(), threading.Event(), list[str]()

    def read() -> None:
        while not stop.is_set():
            count = len(avatar)
            for i in {0, count // 3, count // 2, count - 1} if count else ():
                try:
                    entry = avatar[i]
                except Exception as e:
                    return wrong.append(repr(e))
                if entry is None or entry.place != face(i).place:
                    return wrong.append(f"frame {i}")
        return None

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for i in range(40 * CHUNK_FRAMES):
        avatar.append(face(i))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong


def test_size_is_bounded_and_the_least_recent_go_first(tmp_path: Path) -> None:
    size = 0
    for i, key in enumerate("abcd"):
        cache = AvatarCache(tmp_path, 10**9)
        assert cache.put(key, filled(20))
        path = tmp_path / f"{key}-whole.avatar"
        size = path.stat().st_size
        os.utime(path, (i, i))
    assert AvatarCache(tmp_path, 10**9).get("a"), "reading marks it as used"
    assert AvatarCache(tmp_path, int(3.5 * size)).put("e", filled(20))
    assert sorted(p.stem for p in tmp_path.glob("*.avatar")) == ["a-whole", "d-whole", "e-whole"]


def test_a_read_avatar_survives_its_eviction(tmp_path: Path) -> None:
    cache = AvatarCache(tmp_path, 10**9)
    cache.put("key", filled(100))
    avatar = cache.get("key")
    assert avatar
    for path in tmp_path.iterdir():
        path.unlink()
    assert same(avatar, 100)


def test_many_writers_and_readers(tmp_path: Path) -> None:
    wrong: list[str] = []

    def work() -> None:
        cache = AvatarCache(tmp_path, 10**9)
        for _ in range(5):
            cache.put("key", filled(40))
            avatar = cache.get("key")
            if avatar is None or not same(avatar, 40):
                wrong.append("torn")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert [p.name for p in tmp_path.iterdir()] == ["key-whole.avatar"]


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert AvatarCache(blocked / "cache", 10**9).put("key", filled(3)) is False
    assert AvatarCache(None, 10**9).get("key") is None


def test_keys_depend_on_every_part() -> None:
    parts = [("clip", 25, {"a": 1}), ("clip", 25, {"a": 2}), ("clip", 24, {"a": 1}), ("c", 25, {"a": 1})]
    assert len({cache_key(*p) for p in parts}) == 4
