"""Fixtures of the system tests that these share."""

from tests.system.conftest import cache

__all__ = ["cache"]
