"""`python -m tests.faults [--only GROUP] [--quick]`: run every row, print a table and `N passed, N failed`."""

from __future__ import annotations

import argparse
import sys
import time

from tests.faults.rows import QUICK, ROWS
from tests.faults.world import world


def main() -> int:
    """Exit status 1 when a row failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="rows whose `group: name` holds this text")
    parser.add_argument("--quick", action="store_true", help="leave out the rows that take minutes")
    options = parser.parse_args()
    rows = [r for r in (QUICK if options.quick else ROWS) if options.only in f"{r.group}: {r.name}"]
    failed = 0
    with world(apart=any(r.aside for r in rows)) as w:
        for row in rows:
            began = time.monotonic()
            wrong = w.run(row)
            failed += bool(wrong)
            print(f"{'FAIL' if wrong else 'ok':4} {row.group:9} {row.name:58.58} {time.monotonic() - began:6.1f} s  {wrong}",
                  flush=True)
    print(f"{len(rows) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
