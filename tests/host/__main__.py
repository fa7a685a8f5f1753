"""Boot the host, run the commands, and compare its states."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ipsecgate.errors import GateError
from ipsecgate.lab.guest import KINDS
from tests.host.machine import CHECKOUT, boot

RESULTS = CHECKOUT / ".cache/results/host"
DEMO = "make demo"
TEST = f"make test LIMIT=14400 RESULTS={RESULTS}"

State = dict[str, dict[str, str]]


def differences(before: State, after: State) -> Iterator[str]:
    """Yield a line for each entry that differs."""
    for kind in sorted(before.keys() | after.keys()):
        old, new = before.get(kind, {}), after.get(kind, {})
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                yield f"{kind}: {name}: {old.get(name, 'missing')} -> {new.get(name, 'gone')}"


def lacking(state: State) -> list[str]:
    """Return the entries that the host should have but lacks: without them this proves nothing."""
    texts = {kind: "\n".join(entries) for kind, entries in state.items()}
    expected = {
        "xfrm state": ("spi 0x00000077", "192.0.2.1 dst 192.0.2.2", "192.0.2.2 dst 192.0.2.1"),
        "xfrm policy": ("198.51.100.9/32", "action block", "dport 22"),
        "rule": ("lookup 77",),
        "rule of IPv6": ("lookup 77",),
        "route": ("unreachable 203.0.113.0/24", "table 77", "own0"),
        "pin": ("/sys/fs/bpf/ipsecgate/default/links/",),
        "cgroup": ("/sys/fs/cgroup/own",),
        "process": ("charon-systemd", "sleep infinity"),
        "IKE": ("ESTABLISHED", "INSTALLED"),
        "files of /etc": ("/etc/swanctl/conf.d/own.conf",),
        "unit": ("strongswan.service", "peer.service"),
        "BPF": ("program", "map", "link"),
        "sysctl": ("/proc/sys/net/core/rmem_default",),
    }
    return [
        f"{kind}: {entry}"
        for kind, entries in expected.items()
        for entry in entries
        if entry not in texts[kind]
    ]


def judge(results: Path, commands: Sequence[str]) -> int:
    """Print the differences from the first state; return their number."""
    states = [
        json.loads((results / f"state-{number}.json").read_text())
        for number in range(len(commands) + 1)
    ]
    found = [f"this host lacks {text}" for text in lacking(states[0])]
    for command, after in zip(commands, states[1:], strict=True):
        found += [f"after {command}: {line}" for line in differences(states[0], after)]
    for line in found:
        sys.stdout.write(f"{line}\n")
    counts = ", ".join(f"{kind} {len(entries)}" for kind, entries in states[0].items())
    sys.stdout.write(f"compared: {counts}; {len(found)} differ\n")
    return len(found)


def say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main() -> int:
    """Run the README's two commands on a host whose kernel has ESP; its state must not change."""
    parser = argparse.ArgumentParser(prog="python -m tests.host", description=main.__doc__)
    parser.add_argument("--kernel", choices=KINDS, default="uml", help="the host's kernel (uml)")
    parser.add_argument("--timeout", type=float, default=36000.0, metavar="S", help="(10 hours)")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    parser.add_argument("command", nargs="*", help=f"instead of {DEMO} and {TEST}")
    options = parser.parse_args()
    commands = options.command or [DEMO, TEST]
    results = options.results.absolute()
    try:
        code, _output = boot(options.kernel, commands, results, options.timeout, say)
    except GateError as error:
        sys.stderr.write(f"{error.report()}\n")
        return error.exit_code
    differ = judge(results, commands)
    return code or (1 if differ else 0)


if __name__ == "__main__":
    sys.exit(main())
