"""`python -m tests.faults.aside FILE`: the rows that wait for the worker's own limits, all at once; their verdicts as JSON."""

from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pipeline.settings import Settings
from tests.faults.rows import ALL
from tests.faults.world import Row, world


def main(told: Path) -> None:
    """Write what is wrong with each row."""
    rows = [r for r in ALL if r.aside]
    with world(apart=False) as w:
        w.deadline = Settings().job_deadline_sec
        with ThreadPoolExecutor(len(rows)) as pool:
            verdicts = [wrong for wrong, _ in pool.map(w.act, rows)]
        after = w.after(Row("aside", "the rows that wait", lambda _: None), False)
    told.write_text(json.dumps({f"{r.group}: {r.name}": wrong or after for r, wrong in zip(rows, verdicts)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
