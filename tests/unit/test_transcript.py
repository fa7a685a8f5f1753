"""The example in the docstring of the transcript module works."""

from __future__ import annotations

import re
from typing import Any

from ipsecgate.core.model import events as on
from tests.unit import transcript


def test_the_example_runs() -> None:
    lines = re.findall(r"^ {4}(.+)$", transcript.__doc__ or "", re.MULTILINE)
    names: dict[str, Any] = {**vars(transcript), "on": on}
    exec("\n".join(lines), names)
    assert names["transcript"].is_open()
