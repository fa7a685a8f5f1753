"""What to do about each error that a controller reports."""

from __future__ import annotations

import re

# The first pattern that is found in an error's text has the advice.
_ADVICE = tuple(
    (re.compile(pattern), advice)
    for pattern, advice in (
        (
            r"^IKE daemon: .*(No such file|refused)",
            "start strongSwan: `systemctl start strongswan`",
        ),
        (r"^IKE daemon: no answer", "find out why strongSwan hangs, and restart it"),
        (r"^IKE daemon: ", "see `journalctl -u strongswan`"),
        (
            r"^the last reload was refused",
            "mend the file, then `ipsecgate reload`; until then the old one is in force",
        ),
        (r"\.toml: ", "mend the file, then start the controller"),
        (r"^container:.* is not running", "start it, or remove it from gate.cgroups"),
        (
            r"^cgroup .* does not exist",
            "start the service that lives there, or remove it from gate.cgroups",
        ),
        (r"^cgroup .* is not gated", "`ipsecgate check` shows whose program is there"),
        (r"waits for the address of", "add a bypass policy for the resolver's server"),
        (r"cannot (be written|write)", "free some space on the disk"),
        (r"^POLICY table: full", "use fewer prefix lengths and port ranges, or configure policies"),
        (r"^SPD table: ", "use fewer prefix lengths and port ranges in the connections"),
        (r"inbound", "find what deletes inbound states or policies"),
        (r"no trap is installed", "set `start_action = trap` in the connection"),
        (r"namespaces of containers", "give the controller CAP_SYS_ADMIN"),
    )
)


def advice_on(error: str) -> str:
    """Return what to do about an error, "" if its text says it all."""
    return next((advice for pattern, advice in _ADVICE if pattern.search(error)), "")
