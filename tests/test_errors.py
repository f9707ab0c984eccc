"""The catalogue of failures: complete, the same at the shell and in the documentation."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from pipeline import errors
from pipeline.errors import CATALOGUE, JobError, catalogue, is_known, markdown
from pipeline.run import failure
from pipeline.settings import REPOSITORY
from tests.faults.rows import ALL
from tests.faults.world import Row


def leaves(kind: type[JobError] = JobError) -> set[type[JobError]]:
    below = kind.__subclasses__()
    return {leaf for each in below for leaf in leaves(each)} if below else {kind}


def test_every_class_of_failure_is_in_it_once_for_each_stage_and_reason() -> None:
    assert {known.error for known in CATALOGUE} == leaves()
    told = [(k.error, stage, k.reason) for k in CATALOGUE for stage in k.stages]
    assert len(told) == len(set(told))


@pytest.mark.parametrize("row", [r for r in ALL if r.expect.status != 200], ids=lambda r: f"{r.group}: {r.name}")
def test_what_the_fault_matrix_meets_is_in_it(row: Row) -> None:
    want = row.expect.error_type, row.expect.stage, row.expect.retryable
    assert want in {(r["error_type"], r["stage"], r["retryable"]) for r in catalogue()}


def test_a_body_is_looked_up_by_all_that_tells_it_apart() -> None:
    body = failure(errors.NoFaceFound("none", stage="preprocessing", reason="no_face"))
    assert is_known(body)
    assert not is_known({**body, "stage": "upload"})
    assert not is_known({**body, "retryable": True})


def test_the_documentation_has_it() -> None:
    assert markdown() in (REPOSITORY / "docs" / "api.md").read_text()


def test_the_shell_gives_it() -> None:
    done = subprocess.run([sys.executable, "-m", "pipeline.errors"], cwd=REPOSITORY, capture_output=True, check=True, text=True)
    assert json.loads(done.stdout) == catalogue()
    assert not done.stderr
