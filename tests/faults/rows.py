"""All rows, in the order in which a job meets them."""

from tests.faults import device, files, fuzz, process, requests, sources, speakers, ssrf, uploads
from tests.faults.world import Row

ALL: list[Row] = [
    *sources.ROWS, *ssrf.ROWS, *files.ROWS, *fuzz.ROWS, *requests.ROWS, *speakers.ROWS, *device.ROWS, *uploads.ROWS,
    *process.ROWS]
ALL.sort(key=lambda row: row.aside)  # those that wait are through when the others are
ROWS = [row for row in ALL if not row.long]  # as tests, and with --quick
FULL = [row for row in ALL if not row.brief]
