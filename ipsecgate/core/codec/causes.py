"""The cause of a failed negotiation in plain words, and what to do about it.

VICI's reply is always "establishing CHILD_SA 'x' failed"; the cause is only in the log, as text.
The first rule that the log matches wins, so rules go from specific to general. If none matches,
the last line is the cause, and nothing can be advised.

Source: control-log of strongSwan 5.9.8, each case provoked but for expired certificates and the
kernel's errors, which are from its source; RFC 7296 section 3.10.1.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ipsecgate.core.model.problem import Cause
from ipsecgate.core.model.value import value


@value
class Rule:
    """`log`: lines of the log that show the cause. The rest: as in `Cause`.

    `words`, `advice` and `unresolved` may contain the groups of `log`.
    """

    log: str
    words: str
    advice: str
    is_identity: bool = False
    unresolved: str = ""


ANSWERS = (
    "check that the peer is up, and that UDP ports 500 and 4500 are open in both directions; "
    "`swanctl --list-conns` names its address"
)
_ASK_PEER = (
    "compare the secret, and the ids of `local` and `remote` (`swanctl --list-conns`), with the "
    "peer's; only its administrator can tell, from its log, which of them differs"
)
_PLUGIN = (
    "install libstrongswan-extra-plugins and libstrongswan-standard-plugins and restart "
    "strongSwan, or propose another algorithm; `swanctl --list-algs` lists those that are loaded"
)

RULES: tuple[Rule, ...] = (
    Rule(
        r"no (shared|private) key found for (.+)",
        r"no \1 key is loaded for \2",
        "add it to the secrets in swanctl.conf, then `swanctl --load-creds`",
        is_identity=True,
    ),
    Rule(
        r"for '(.+)' - '(.+)', but MAC mismatched",
        r"the peer could not prove its identity: another pre-shared key for \1 and \2",
        r"give both sides the same secret for the ids \1 and \2, then `swanctl --load-creds`",
        is_identity=True,
    ),
    Rule(
        r"subject certificate invalid \((.+)\)",
        r"a certificate is not valid now (\1)",
        "check the clock of both hosts (`timedatectl`), or renew the certificate",
    ),
    Rule(
        r"no trusted .*public key found for (.+)",
        r"no trusted certificate of \1",
        "put the peer's certificate or its CA into /etc/swanctl (x509, x509ca), then "
        "`swanctl --load-creds`",
        is_identity=True,
    ),
    Rule(
        r"constraint check failed: (.+)",
        r"the peer is not who it should be: \1",
        "compare `id` and `cacerts` of the connection's `remote` with the peer's certificate",
        is_identity=True,
    ),
    Rule(
        r"authentication of '(.+)' \(myself\)[\s\S]*received AUTHENTICATION_FAILED",
        r"the peer refused our authentication as \1: keys and identities must agree on both sides",
        _ASK_PEER,
        is_identity=True,
    ),
    Rule(
        r"received AUTHENTICATION_FAILED",
        "the peer refused our authentication: keys and identities must agree on both sides",
        _ASK_PEER,
        is_identity=True,
    ),
    Rule(
        r"configured (?:DH group|key exchange method) (\S+) not supported",
        r"strongSwan has no plugin for the key exchange \1",
        _PLUGIN,
    ),
    Rule(
        r"[A-Z_]+ ([A-Z0-9_]+)(?: \(key size \d+\))? not supported!",
        r"strongSwan has no plugin for the algorithm \1",
        _PLUGIN,
    ),
    Rule(
        r"received NO_PROPOSAL_CHOSEN notify, no CHILD_SA built",
        "no ESP proposal in common with the peer",
        "compare `esp_proposals` on both sides",
    ),
    Rule(
        r"received NO_PROPOSAL_CHOSEN",
        "the peer has no connection for us, or no IKE proposal in common",
        "on the peer, load a connection for this host's address, and compare `proposals`; "
        "`ipsecgate check` names the proposals for which strongSwan lacks a plugin",
    ),
    Rule(
        r"received TS_UNACCEPTABLE",
        "the peer accepts none of our traffic selectors",
        "compare local_ts and remote_ts with the peer's: the local ones of one side must be the "
        "remote ones of the other",
    ),
    Rule(
        r"received netlink error: (.+)",
        r"the kernel refused the SA: \1",
        "see `dmesg`; the kernel may lack the algorithm: `modprobe` its module, or change "
        "esp_proposals on both sides",
    ),
    Rule(
        r"received (\w+) (?:notify|error)",
        r"the peer answered \1",
        "see the peer's log: it refused, and says there why",
    ),
    Rule(
        r"unable to resolve %any",
        "the connection names no peer (remote_addrs = %any)",
        "set remote_addrs to the peer's address, or wait until the peer connects",
    ),
    Rule(
        r"unable to resolve (\S+),",
        r"the peer's address \1 can't be resolved",
        r"correct the name in remote_addrs, or mend its lookup (`getent hosts \1`); an address "
        "needs no lookup",
        unresolved=r"\1",
    ),
    Rule(
        r"error writing to socket: (.+)",
        r"packets to the peer can't be sent: \1",
        "see `ip route get` for the peer's address",
    ),
    Rule(
        r"giving up after (\d+) retransmits",
        r"the peer did not answer (\1 retransmits)",
        ANSWERS,
    ),
    Rule(
        r"(.*CHILD_SA config '.+' not found.*)",
        r"\1",
        "load the connection: `swanctl --load-conns`",
    ),
)


def failure_cause(lines: Sequence[str]) -> Cause | None:
    """Return the cause that the log lines of a negotiation give; None without any line."""
    log = "\n".join(lines)
    for rule in RULES:
        if match := re.search(rule.log, log):
            return Cause(
                match.expand(rule.words),
                match.expand(rule.advice),
                rule.is_identity,
                match.expand(rule.unresolved),
            )
    return Cause(lines[-1]) if lines else None


def out_of_time(limit: float) -> Cause:
    """Return the cause of a negotiation that had no end within so many seconds."""
    return Cause(f"no CHILD_SA within {limit:g} s: the peer is slow or silent", ANSWERS)


def gave_up(seconds: float) -> Cause:
    """Return the cause of a negotiation that strongSwan ended by itself after a while."""
    return Cause(
        f"strongSwan gave up after {seconds:.0f} s: the peer is silent, or slow to refuse",
        f"{ANSWERS}; the next attempt asks for the cause",
    )
