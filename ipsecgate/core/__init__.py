"""The pure core: domain types, events, commands, decisions.

Standard library only. No socket, no file, no clock: whatever happens outside
arrives as an event (`events`), and whatever must happen outside leaves as a
command (`commands`). `tests/unit/test_imports.py` enforces it.
"""
