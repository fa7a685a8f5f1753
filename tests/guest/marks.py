"""The mark of tests that need a guest, which machines with a fitting kernel do not have."""

from __future__ import annotations

import pytest

from ipsecgate.lab.kernel import missing_feature

where_guests_run = pytest.mark.skipif(
    missing_feature() is None, reason="this kernel has ESP and IPv6: nothing runs in a guest here"
)
