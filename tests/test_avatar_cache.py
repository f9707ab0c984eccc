"""The avatar cache against a model of it: whoever stored enough of a clip answers, as long as what was used last fits."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from musetalk.avatar import Avatar, AvatarCache
from tests.faults.device import mounted
from tests.test_avatar import face, same

CLIPS = {"a": 7, "b": 40, "c": 66}  # frames of the clips that are asked for
PAGE = 4096  # what a file's size is rounded up to on the small disk
DISK = 40 * PAGE


def filled(clip: str, frames: int) -> Avatar:
    """The first frames of a clip, prepared; the clip is known whole when they are all of it."""
    avatar = Avatar.new()
    for i in range(min(frames, CLIPS[clip])):
        avatar.append(None if i % 7 == 3 else face(i))
    avatar.finish(complete=frames >= CLIPS[clip])
    return avatar


class Cache(RuleBasedStateMachine):
    """Two workers share a folder; each also keeps avatars in memory. `stored`: what was used last comes last."""

    folder: Path
    limit, memory, room, block = 10**9, 10**9, 10**9, 1

    @initialize()
    def start(self) -> None:
        self.place = Path(tempfile.mkdtemp(dir=self.folder))
        self.workers = [self.worker(), self.worker()]
        self.stored: dict[str, tuple[int, int]] = {}  # clip -> frames, bytes
        self.most: dict[str, int] = {}  # the most frames of a clip that were ever put

    def worker(self) -> AvatarCache:
        return AvatarCache(self.place, self.limit, self.memory)

    @rule(who=st.integers(0, 1))
    def restart(self, who: int) -> None:
        self.workers[who] = self.worker()

    @rule(who=st.integers(0, 1), clip=st.sampled_from(sorted(CLIPS)), frames=st.integers(1, 70))
    def put(self, who: int, clip: str, frames: int) -> None:
        frames = min(frames, CLIPS[clip])
        avatar = filled(clip, frames)
        avatar.write(file := BytesIO(), clip)
        size = -(-len(file.getvalue()) // self.block) * self.block
        assert self.workers[who].put(clip, avatar) == (size <= min(self.limit, self.room))
        self.most[clip] = max(self.most.get(clip, 0), frames)
        if size <= min(self.limit, self.room):
            self.use(clip, max(self.stored.pop(clip, (0, 0)), (frames, size)))

    def use(self, clip: str, entry: tuple[int, int]) -> None:
        self.stored[clip] = entry
        while sum(size for _, size in self.stored.values()) > min(self.limit, self.room):
            del self.stored[next(iter(self.stored))]

    @rule(who=st.integers(0, 1), clip=st.sampled_from(sorted(CLIPS)), frames=st.integers(1, 100))
    def get(self, who: int, clip: str, frames: int) -> None:
        avatar = self.workers[who].get(clip, frames)
        needed = min(frames, CLIPS[clip])
        enough = self.stored.get(clip, (0, 0))[0] >= needed
        whole = self.most.get(clip, 0) == CLIPS[clip]
        assert avatar is not None or not enough, f"{self.stored[clip][0]} frames of {clip} are stored, {frames} were asked for"
        if avatar is not None:
            assert len(avatar) >= needed
            assert avatar.complete == (len(avatar) == CLIPS[clip])
            assert whole or not avatar.complete
            assert same(avatar, len(avatar))
            avatar.close()
            if clip in self.stored:
                self.use(clip, self.stored.pop(clip))

    def teardown(self) -> None:
        assert not list(self.place.glob(".*")), "left half a file"
        shutil.rmtree(self.place)


def run(machine: type[Cache], **how: object) -> None:
    """Play the rules in many orders, the same each time."""
    run_state_machine_as_test(type("Machine", (machine,), how),  # type: ignore[no-untyped-call]
                              settings=settings(max_examples=40, stateful_step_count=25, deadline=None, derandomize=True,
                                                database=None))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that holds DISK bytes of files."""
    with mounted(tmp_path / "disk", f"size={DISK}") as real:
        if not real:
            pytest.skip("no file system can be mounted here")
        yield tmp_path / "disk"


def test_whoever_stored_enough_answers(tmp_path: Path) -> None:
    run(Cache, folder=tmp_path)


@pytest.mark.parametrize("memory", [0, 12_000])
def test_what_was_used_last_stays_within_the_limit(tmp_path: Path, memory: int) -> None:
    run(Cache, folder=tmp_path, limit=30_000, memory=memory)


def test_memory_does_not_hide_the_disk(tmp_path: Path) -> None:
    run(Cache, folder=tmp_path, memory=6_000)


def test_a_full_disk_heals(small_disk: Path) -> None:
    """What lies there longest makes room, whatever the configured limit is."""
    (small_disk / "another's").write_bytes(bytes(DISK - 10 * PAGE))
    run(Cache, folder=small_disk, memory=0, room=10 * PAGE, block=PAGE)


def test_speeches_that_grow_on_one_clip(tmp_path: Path) -> None:
    """1 s of speech, then 2.4 s again and again: the second of these is answered."""
    cache = AvatarCache(tmp_path, 10**9)
    assert cache.put("c", filled("c", 25))
    assert cache.get("c", 60) is None
    assert cache.put("c", filled("c", 60))
    for reader in (cache, AvatarCache(tmp_path, 10**9)):
        found = reader.get("c", 60)
        assert found
        assert same(found, 60)


def test_a_shorter_avatar_takes_nothing_from_another_worker(tmp_path: Path) -> None:
    assert AvatarCache(tmp_path, 10**9).put("c", filled("c", 66))
    assert AvatarCache(tmp_path, 10**9, memory=0).put("c", filled("c", 5))
    found = AvatarCache(tmp_path, 10**9).get("c", 1000)
    assert found
    assert torch.equal(torch.tensor([len(found), found.complete]), torch.tensor([66, True]))
