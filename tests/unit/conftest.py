"""Fixtures that several transcripts begin with."""

from __future__ import annotations

import pytest

from ipsecgate.core.model import events as on
from tests.unit.transcript import SOURCES, TRAP, Transcript, connected


@pytest.fixture
def trapped() -> Transcript:
    """IKE connected, its trap in the kernel, no SA."""
    transcript = Transcript()
    transcript.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES)
    return transcript
