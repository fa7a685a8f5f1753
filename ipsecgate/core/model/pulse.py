"""When what is done regularly is due: at multiples of its period, so that wake-ups are shared."""

from __future__ import annotations

PULSE = 5.0  # seconds between the service's reports and retries; less if the watchdog asks for it


def until_pulse(now: float, pulse: float = PULSE) -> float:
    """Return the seconds until the next pulse, by a monotonic clock in seconds."""
    return pulse - now % pulse
