"""The fault harness as tests: every row with its checks (`python -m tests.faults` prints them as a table)."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest

from pipeline import errors
from tests.faults import world as faults
from tests.faults.device import without_gpu
from tests.faults.rows import ROWS
from tests.faults.world import SUCCESS, Row, World, media


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with faults.world() as made:
        yield made


@pytest.mark.full
@pytest.mark.parametrize("row", [pytest.param(row, id=f"{row.group}: {row.name}") for row in ROWS])
def test_row(world: World, row: Row) -> None:
    wrong = world.run(row)
    assert not wrong, wrong


def test_the_harness_can_fail(world: World) -> None:
    """A wrong body, a failure that the catalogue lacks, a file left behind, a secret said and a worker that is broken
    afterwards are each seen.
    """
    world.settle = 0.2
    assert "expected success" in world.run(Row("self", "body", lambda w: w.job(video="/status/404"), SUCCESS))
    assert "expected (422" in world.run(Row("self", "stage", lambda w: w.job(video="/page"), media("download")))

    def judges_itself(w: World) -> None:
        w.job(video="/reset")

    others = [known for known in errors.CATALOGUE if known.error != errors.SourceUnavailable]
    with mock.patch.object(errors, "CATALOGUE", others):
        assert "the catalogue of failures lacks" in world.run(Row("self", "failure", judges_itself))

    def leaves_a_file(w: World) -> None:
        (w.temporary / "left").write_text("")

    assert "temporary files ['left']" in world.run(Row("self", "file", leaves_a_file))
    (world.temporary / "left").unlink()
    assert "a secret was said" in world.run(Row("self", "secret", lambda w: w.said.append(faults.CANARY)))
    world.service, _ = without_gpu(world)
    assert "the healthy job" in world.run(Row("self", "unfit", lambda w: None))
    world.said.clear()
