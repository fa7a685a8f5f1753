"""What to do about each error that a controller reports."""

from __future__ import annotations

import re

from ipsecgate.admin.status_document import Problem

# The first pattern that is found in an error's text has the advice.
_ADVICE = tuple(
    (re.compile(pattern), advice)
    for pattern, advice in (
        (
            r"^the last reload was refused",
            "mend the file, then `ipsecgate reload`; until then the old one is in force",
        ),
        (r"\.toml: ", "mend the file, then start the controller"),
        (
            r"^(container|label|pod):.* it will be gated",
            "start it, or remove it from gate.cgroups",
        ),
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


def problem(error: str) -> Problem:
    """Return an error, and what to do about it: as the controller says itself, or as known here."""
    text, _, advice = error.partition(". Next: ")
    known = (advice for pattern, advice in _ADVICE if pattern.search(error))
    return {"text": text, "advice": advice or next(known, "")}
