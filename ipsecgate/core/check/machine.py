"""The machine: its clock, its limits, and the units and hooks that are installed on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from datetime import UTC, datetime

from ipsecgate.core.check.finding import Finding, ok, warning
from ipsecgate.core.model.value import value

CLOCK, LIMITS, UNITS = "clock", "limits", "units"
RTC_SLACK = 60.0  # seconds
CLOCK_SLACK = 2.0  # seconds
ENABLED = ("ipsecgate-load.service", "ipsecgate.service")  # units that the package enables
FULL = 0.8  # of a limit


@value
class Clock:
    """The wall clock; times are seconds since the epoch.

    `synchronised`: as the kernel says, None: unknown. `rtc`: the hardware clock, None: there is
    none, or it keeps local time. `installed`: when the youngest SA was installed, 0: there is none.
    """

    now: float
    synchronised: bool | None = None
    rtc: float | None = None
    installed: float = 0.0
    uses_certificates: bool = False


def check_clock(clock: Clock) -> list[Finding]:
    """Judge the clock: certificates and the lifetimes of SAs depend on it."""
    found = []
    back = clock.installed - clock.now
    if back > CLOCK_SLACK:
        found.append(
            warning(
                CLOCK,
                f"was set back by at least {back:.0f} s since the youngest SA was installed, so "
                "SAs end that much too late",
                "`swanctl --rekey --child NAME` for each child of `swanctl --list-sas`; "
                "see `timedatectl`",
            )
        )
    if clock.uses_certificates and clock.synchronised is False:
        found.append(
            warning(
                CLOCK,
                f"says {_time(clock.now)} and is not synchronised, but connections use "
                "certificates, which are valid for a time only",
                "`timedatectl set-ntp true`, or run chrony",
            )
        )
    if clock.rtc is not None and abs(clock.rtc - clock.now) > RTC_SLACK:
        found.append(
            warning(
                CLOCK,
                f"the hardware clock differs by {abs(clock.rtc - clock.now):.0f} s; the next boot "
                "begins with it, and certificates may then not be valid yet",
                "`hwclock --systohc`",
            )
        )
    unneeded = ", not synchronised; no connection uses certificates, which would need that"
    state = {True: ", synchronised", False: unneeded, None: ""}[clock.synchronised]
    return found or [ok(CLOCK, f"{_time(clock.now)}{state}")]


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(" ", "seconds").replace("+00:00", " UTC")


@value
class Limit:
    """How much of something is used, or needed, and how much there may be."""

    what: str
    used: int
    most: int
    hint: str
    effect: str = ""  # when it is reached


def check_limits(limits: Iterable[Limit]) -> list[Finding]:
    """Judge what may run out."""
    known = list(limits)
    found = [
        warning(LIMITS, f"{_used(one)}; {one.effect}", one.hint)
        for one in known
        if one.used > FULL * one.most
    ]
    return found or [ok(LIMITS, "; ".join(map(_used, known)))]


def _used(limit: Limit) -> str:
    return f"{limit.used:,} of {limit.most:,} {limit.what}"


@value
class Unit:
    """A unit of systemd. `text`: as installed, None: it is not. `shipped`: this version's.

    `state`: enabled, disabled, ...; "" if systemd does not run. `needs_reload`: systemd has read
    an older text.
    """

    name: str
    text: str | None
    shipped: str
    state: str = ""
    needs_reload: bool = False


def check_units(units: Iterable[Unit], old_hooks: Iterable[str]) -> list[Finding]:
    """Judge whether what is installed is this version's. `old_hooks`: pinned ones that are not."""
    known = list(units)
    found = [problem for unit in known for problem in _unit_problems(unit)]
    hooks = ", ".join(sorted(old_hooks))
    if hooks:
        found.append(
            warning(
                UNITS,
                f"the pinned hooks are another version's: {hooks}",
                "`systemctl restart ipsecgate` puts this version's in force, and opens nothing",
            )
        )
    if all(unit.text is None for unit in known):
        nothing = "none is installed, so nothing is gated after a boot until somebody starts it"
        found.append(warning(UNITS, nothing, "install the package, or `make install`"))
    return found or [ok(UNITS, f"{', '.join(unit.name for unit in known)}: this version's")]


def _unit_problems(unit: Unit) -> Iterator[Finding]:
    if unit.text is None:
        return
    if unit.text != unit.shipped:
        yield warning(
            UNITS,
            f"{unit.name} differs from this version's",
            "install this version's (put changes of your own into a drop-in: `systemctl edit "
            f"{unit.name}`), then `systemctl daemon-reload`",
        )
    if unit.needs_reload:
        yield warning(
            UNITS, f"systemd has not read the present {unit.name}", "`systemctl daemon-reload`"
        )
    if unit.state == "disabled" and unit.name in ENABLED:
        yield warning(
            UNITS,
            f"{unit.name} is not enabled, so nothing starts it at boot",
            f"`systemctl enable {unit.name}`",
        )
