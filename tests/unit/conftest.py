"""Fixtures that several unit tests share."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ipsecgate.core.model import events as on
from ipsecgate.edges.strongswan.client import IkeClient
from tests.unit.fake_charon import YES, FakeCharon, answering, streaming
from tests.unit.transcript import SOURCES, TRAP, Transcript, connected


@pytest.fixture
def trapped() -> Transcript:
    """IKE connected, its trap in the kernel, no SA."""
    transcript = Transcript()
    transcript.after(on.KernelSnapshot((TRAP,), ()), connected(), SOURCES)
    return transcript


@pytest.fixture
async def charon(tmp_path: Path) -> AsyncIterator[FakeCharon]:
    """A fake charon without SAs."""
    path = tmp_path / "vici"
    async with FakeCharon(path, list_sas=streaming("list-sa"), terminate=answering(YES)) as fake:
        yield fake


@pytest.fixture
async def client(charon: FakeCharon) -> AsyncIterator[IkeClient]:
    """A client connected to the fake charon."""
    async with await IkeClient.connect(charon.path) as ike:
        yield ike
