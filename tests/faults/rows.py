"""All rows, in the order in which a job meets them."""

from tests.faults import device, files, process, requests, sources, ssrf, uploads
from tests.faults.world import Row

ROWS: list[Row] = [*sources.ROWS, *ssrf.ROWS, *files.ROWS, *requests.ROWS, *device.ROWS, *uploads.ROWS, *process.ROWS]
