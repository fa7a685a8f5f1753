"""The cause of a failed negotiation in plain words, and what to do about it.

VICI's reply is always "establishing CHILD_SA 'x' failed"; the cause is only in the log, as text.
The first rule that the log matches wins, so rules go from specific to general. If none matches,
the last line is returned unchanged, and nothing can be advised.

Source: control-log of strongSwan 5.9.8, each case provoked but for expired certificates and the
kernel's errors, which are from its source; RFC 7296 section 3.10.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from ipsecgate.core.model.value import value

SILENT = "the peer is slow or silent"  # the end of our own words for a negotiation out of time


@value
class Rule:
    """`log`: lines of the log that show the cause. `words`: the cause. `advice`: what to do.

    Words and advice may contain the groups of `log`.
    """

    log: str
    words: str
    advice: str


ANSWERS = (
    "check that the peer is up, and that UDP ports 500 and 4500 are open in both directions; "
    "`swanctl --list-conns` names its address"
)
_ASK_PEER = (
    "compare the secret, and the ids of `local` and `remote` (`swanctl --list-conns`), with the "
    "peer's; only its administrator can tell, from its log, which of them differs"
)
_PLUGIN = (
    "install libstrongswan-extra-plugins and libcharon-extra-plugins and restart strongSwan, or "
    "propose another algorithm; `swanctl --list-algs` lists those that are loaded"
)

RULES: tuple[Rule, ...] = (
    Rule(
        r"no (shared|private) key found for (.+)",
        r"no \1 key is loaded for \2",
        "add it to the secrets in swanctl.conf, then `swanctl --load-creds`",
    ),
    Rule(
        r"for '(.+)' - '(.+)', but MAC mismatched",
        r"the peer could not prove its identity: another pre-shared key for \1 and \2",
        r"give both sides the same secret for the ids \1 and \2, then `swanctl --load-creds`",
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
    ),
    Rule(
        r"constraint check failed: (.+)",
        r"the peer is not who it should be: \1",
        "compare `id` and `cacerts` of the connection's `remote` with the peer's certificate",
    ),
    Rule(
        r"authentication of '(.+)' \(myself\)[\s\S]*received AUTHENTICATION_FAILED",
        r"the peer refused our authentication as \1: keys and identities must agree on both sides",
        _ASK_PEER,
    ),
    Rule(
        r"received AUTHENTICATION_FAILED",
        "the peer refused our authentication: keys and identities must agree on both sides",
        _ASK_PEER,
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
        "`ipsecgate check` names what a plugin is missing for",
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
)

# Causes that no log line gives: the negotiation's own end. They are in words already.
OURS: tuple[tuple[str, str], ...] = (
    (r"strongSwan gave up after .+", f"{ANSWERS}; the next attempt asks for the cause"),
    (rf"no CHILD_SA within .+: {SILENT}", ANSWERS),
    (r"strongSwan did not finish within .+", "see strongSwan's log: `journalctl -u strongswan`"),
    (
        r"strongSwan reports it as up, but the source .+ is not in the local selector (.+) \(.+\)",
        r"the peer agrees with \1: change local_ts here and remote_ts on the peer, or give this "
        r"host an address in \1",
    ),
    (
        r"strongSwan reports it as up, but no SA protects .+",
        "compare the child's traffic selectors (`swanctl --list-sas`) with the flow, and see "
        "`ip xfrm policy`",
    ),
    (r"CHILD_SA config '.+' not found", "load the connection: `swanctl --load-conns`"),
)


def failure_cause(lines: Sequence[str]) -> str | None:
    """Return the cause that the log lines of a negotiation give; None without any line."""
    log = "\n".join(lines)
    for rule in RULES:
        if match := re.search(rule.log, log):
            return match.expand(rule.words)
    return lines[-1] if lines else None


def next_step(cause: str) -> str:
    """Return what to do about a cause, "" if it is none of those that are known here."""
    for pattern, advice in _known():
        if match := pattern.fullmatch(cause):
            return match.expand(advice)
    return ""


def _known() -> Iterator[tuple[re.Pattern[str], str]]:
    """Yield a pattern for each cause in words, and the advice."""
    for rule in RULES:
        words = re.sub(r"\\\\\d", "(.+)", re.escape(rule.words))
        yield re.compile(words), rule.advice
    for words, advice in OURS:
        yield re.compile(words), advice


_UNRESOLVED = re.compile(r"the peer's address (\S+) can't be resolved")


def unresolved_name(cause: str) -> str:
    """Return the name that a cause says can't be resolved, "" if it says something else."""
    found = _UNRESOLVED.fullmatch(cause)
    return found[1] if found else ""
