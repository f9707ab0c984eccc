"""What was found by hostile use and has tests elsewhere, shown as rows, too: those tests, run by pytest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from pipeline.settings import REPOSITORY

# what is shown -> the tests (their beginnings) that show it
SHOWN: dict[str, tuple[str, ...]] = {
    "pictures": (
        "test_turns.py::", "test_media.py::test_a_size_that_changes", "test_media.py::test_a_frame_stream_of_another_size",
        "test_media.py::test_hdr_becomes_bt709", "test_media.py::test_interlaced", "test_media.py::test_files_put_one_after",
        "test_media.py::test_speeches_put_one_after",
        "test_media.py::test_the_readme_names_what_is_accepted"),
    "speech": ("test_sound.py::",),
    "storage": (
        "test_delivery.py::",
        "test_storage.py::test_cancel", "test_storage.py::test_deadline", "test_storage.py::test_another_job_goes_on",
        "test_storage.py::test_the_same_large_file", "test_storage.py::test_a_rejected_key",
        "test_storage.py::test_a_key_that"),
    "download": ("test_download.py::test_a_job_stops_at_once", "test_download.py::test_urls_that_cannot_be_parsed"),
    "door": (
        "test_door.py", "test_request_limit.py", "test_callbacks.py::",
        "test_server.py::test_head", "test_server.py::test_half_open", "test_server.py::test_a_client_that_hangs_up",
        "test_server.py::test_a_device_that_is_not_there", "test_server.py::test_health_has_a_port",
        "test_server.py::test_queue"),
    "settings": ("test_contract.py::test_a_bad_setting_is_named", "test_device.py::test_warming_up"),
    "shell": ("test_cli.py::",),
    "example": ("test_orchestrator.py", "test_server.py::test_orchestrator", "test_queue.py::test_orchestrator"),
}


Tell = Callable[[str, str, float, str], None]  # group, name, seconds, what is wrong


class Suite:
    """A plugin of pytest that runs what is shown, and tells each verdict."""

    def __init__(self, only: str, tell: Tell) -> None:
        self.only, self.tell = only, tell

    @staticmethod
    def _row(test: str) -> tuple[str, str]:
        """A test's group and its name in the table; no group for one that is not shown."""
        test = test.removeprefix("tests/")
        group = next((group for group, tests in SHOWN.items() if test.startswith(tests)), "")
        name, bracket, values = test.partition("::")[2].removeprefix("test_").partition("[")
        return group, f"{name.replace('_', ' ')}{bracket and ': '}{values.removesuffix(']')}"

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Leave what is shown and asked for."""
        rows = [(item, *self._row(item.nodeid)) for item in items]
        items[:] = [item for item, group, name in rows if group and self.only in f"{group}: {name}"]

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Tell of a test that ran or could not."""
        if report.when == "call" or report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            wrong = "" if report.outcome != "failed" else str(crash.message if crash else report.longrepr).partition("\n")[0]
            self.tell(*self._row(report.nodeid), report.duration, wrong)


def run(only: str, tell: Tell) -> None:
    """Run what is shown and holds `only` in its `group: name`."""
    files = sorted({str(REPOSITORY / "tests" / test.partition("::")[0]) for tests in SHOWN.values() for test in tests})
    pytest.main(["-o", "addopts=", "-p", "no:terminal", "-p", "no:cacheprovider", *files], plugins=[Suite(only, tell)])
