"""A table of figures with verdicts, printed as they come."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    name: str
    value: str
    limit: str = ""
    verdict: str = ""


@dataclass
class Report:
    """What was found, printed as it comes."""

    device: torch.device
    rows: list[Row] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    @property
    def seconds(self) -> float:
        """Since the report began."""
        return time.perf_counter() - self.began

    def add(self, name: str, value: Any, limit: str = "", good: bool | None = None) -> None:
        """A figure; with `good` also a verdict."""
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        row = Row(name, shown, limit, "" if good is None else "PASS" if good else "FAIL")
        self.figures[name] = value
        self.rows.append(row)
        print(f"{row.verdict:<5}{row.name:<52} {row.value:<28} {row.limit}", flush=True)

    def skip(self, name: str, why: str) -> None:
        """A row that this machine cannot have."""
        self.rows.append(Row(name, why, "", "SKIP"))
        print(f"SKIP {name:<52} {why}", flush=True)

    @property
    def failed(self) -> list[str]:
        """Names of the rows that failed."""
        return [row.name for row in self.rows if row.verdict == "FAIL"]

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """A group of rows; an exception in it is a FAIL, and the report goes on."""
        began = time.perf_counter()
        try:
            yield
        except Exception as e:
            self.add(name, f"{type(e).__name__}: {e}".partition("\n")[0][:90], "", False)
        self.figures[f"{name}: seconds"] = round(time.perf_counter() - began, 1)
