"""`python -m tests.faults [--only GROUP] [--quick]`: run every row, print a table and `N passed, N failed`."""

from __future__ import annotations

import argparse
import sys
import time

from tests.faults import suite
from tests.faults.rows import FULL, ROWS
from tests.faults.world import world


class Table:
    """Prints rows as they are done, and counts them."""

    def __init__(self) -> None:
        self.passed = self.failed = 0

    def add(self, group: str, name: str, seconds: float, wrong: str) -> None:
        """One row; `wrong` is empty when it passed."""
        self.failed += bool(wrong)
        self.passed += not wrong
        print(f"{'FAIL' if wrong else 'ok':4} {group:9} {name:58.58} {seconds:6.1f} s  {wrong}", flush=True)


def main() -> int:
    """Exit status 1 when a row failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose `group: name` holds this text")
    parser.add_argument("--quick", action="store_true", help="fewer mutated files and jobs in a row, as the tests run them")
    options = parser.parse_args()
    table = Table()
    if rows := [r for r in (ROWS if options.quick else FULL) if options.only in f"{r.group}: {r.name}"]:
        with world(apart=any(r.aside for r in rows)) as w:
            for row in rows:
                began = time.monotonic()
                wrong = w.run(row)
                table.add(row.group, row.name, time.monotonic() - began, wrong)
    suite.run(options.only, table.add)
    print(f"{table.passed} passed, {table.failed} failed")
    return int(table.failed > 0)


if __name__ == "__main__":
    sys.exit(main())
