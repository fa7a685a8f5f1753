"""The cause of a failed negotiation in plain words, extracted from strongSwan's log.

VICI's reply is always "establishing CHILD_SA 'x' failed"; the cause is only in the log, as text.
The first rule that matches any line wins, so rules go from specific to general. If none matches,
the last line is returned unchanged.

Source: control-log of strongSwan 5.9.8, each case provoked; RFC 7296 section 3.10.1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), words)
    for pattern, words in (
        (r"no (shared|private) key found for (.+)", r"no \1 key is loaded for \2"),
        (r"MAC mismatched", "the peer could not prove its identity: another pre-shared key"),
        (r"no trusted .*public key found for (.+)", r"no trusted certificate of \1"),
        (r"constraint check failed: (.+)", r"the peer is not who it should be: \1"),
        (
            r"received AUTHENTICATION_FAILED",
            "the peer refused our authentication: keys and identities must agree on both sides",
        ),
        (
            r"received NO_PROPOSAL_CHOSEN notify, no CHILD_SA built",
            "no ESP proposal in common with the peer",
        ),
        (
            r"received NO_PROPOSAL_CHOSEN",
            "the peer has no connection for us, or no IKE proposal in common",
        ),
        (r"received TS_UNACCEPTABLE", "the peer accepts none of our traffic selectors"),
        (r"received (\w+) (?:notify|error)", r"the peer answered \1"),
        (r"unable to resolve (\S+),", r"the peer's address \1 can't be resolved"),
        (r"giving up after (\d+) retransmits", r"the peer did not answer (\1 retransmits)"),
    )
)


def failure_cause(lines: Sequence[str]) -> str | None:
    """Return the cause that the log lines of a negotiation give; None without any line."""
    for pattern, words in RULES:
        for line in lines:
            if match := pattern.search(line):
                return match.expand(words)
    return lines[-1] if lines else None


_UNRESOLVED = re.compile(r"the peer's address (\S+) can't be resolved")


def unresolved_name(cause: str) -> str:
    """Return the name that a cause says can't be resolved, "" if it says something else."""
    found = _UNRESOLVED.fullmatch(cause)
    return found[1] if found else ""
