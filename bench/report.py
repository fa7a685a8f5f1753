"""A benchmark's report: for a reader a table, for a program one JSON object.

    {"bench": "growth", "title": ..., "machine": {...}, "settings": {...},
     "rows": [{"name": ..., "unit": "us", "of": {"tunnels": 100}, "samples": [...]}, ...]}

Samples are kept whole, so that whoever reads them can choose the statistic.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles

Value = str | int | float


def machine() -> dict[str, Value]:
    """Return the processor, the kernel, and the load of the last minute."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.machine(),
        "processors": os.cpu_count() or 1,
        "kernel": platform.release().partition("-")[0],  # without the builder's suffix
        "load": os.getloadavg()[0],
    }


@dataclass(frozen=True)
class Row:
    """One measured quantity. `of` says of what: the columns that distinguish this row."""

    name: str
    unit: str
    samples: tuple[float, ...]
    of: Mapping[str, Value] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """The median of the samples."""
        return median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and the third quartile; the sample itself if there is only one."""
        return self.percentile(25), self.percentile(75)

    def percentile(self, percent: int) -> float:
        """Return the value below which so many percent of the samples lie."""
        if len(self.samples) == 1:
            return self.samples[0]
        return quantiles(self.samples, n=100, method="inclusive")[percent - 1]


@dataclass(frozen=True)
class Report:
    """All that one benchmark measured in one run."""

    bench: str
    title: str
    rows: tuple[Row, ...]
    settings: Mapping[str, Value] = field(default_factory=dict)
    machine: Mapping[str, Value] = field(default_factory=machine)

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read what `write` has written. Raises: OSError, ValueError, TypeError, KeyError."""
        document = json.loads(path.read_text())
        rows = tuple(Row(**{**row, "samples": tuple(row["samples"])}) for row in document["rows"])
        return cls(**{**document, "rows": rows})

    def write(self, path: Path) -> None:
        """Write the JSON object. Raises: OSError."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{json.dumps(asdict(self), indent=1)}\n")
