"""Fixtures of the system tests that these share; imported first, for the asserts of its modules."""

from tests.system.conftest import lab

__all__ = ["lab"]
