"""Random NAT rules, as text for nft and for iptables-restore."""

from __future__ import annotations

import re
from random import Random

SNATS = ("192.0.2.1", "192.0.2.2")
DNATS = ("10.2.0.9", "10.3.0.7", "198.51.100.4", "203.0.113.5")
NETWORKS = ("10.0.0.0/24", "10.0.0.9", "10.0.0.0/8", "172.17.0.0/16", "10.2.0.0/16", "10.3.0.0/17",
            "10.2.0.9", "198.51.100.4", "0.0.0.0/1")  # fmt: skip
PORTS = ("53", "80", "443", "1-100", "8080-30000")
KIND = re.compile(r"-m \w+|-\S+")  # of a match of iptables
MARKS = ("0x0", "0x1", "0x2", "0x5")


def sets_marks_elsewhere(text: str) -> bool:
    """Tell whether rules of other tables set marks, which the evaluator takes for unknown."""
    return "priority mangle" in text or "--set-mark 2" in text


def nft(random: Random, *, unclear: bool, fib: bool) -> str:
    """Return a table with base chains and two more that they jump to."""
    lines = ["table ip drawn {"]
    if random.random() < 0.5:
        lines += [
            "set nets { type ipv4_addr; flags interval; elements = "
            "{ 10.0.0.0/24, 10.2.0.0-10.2.0.63, 172.17.0.2 } }",
            "set pairs { type ipv4_addr . inet_service; flags interval; elements = "
            "{ 10.2.0.0/25 . 50-500, 10.3.0.7 . 80 } }",
        ]
    has_sets = len(lines) > 1
    for name in ("user1", "user2"):
        lines.append(f"chain {name} {{")
        lines += [
            _nft_rule(random, name, unclear, fib, has_sets) for _ in range(random.randrange(4))
        ]
        lines.append("}")
    if random.random() < 0.3:
        lines += [
            "chain marks { type filter hook output priority mangle;",
            "meta mark set 0x2",
            "}",
        ]
    for hook in ("prerouting", "output", "postrouting"):
        priority = "srcnat" if hook == "postrouting" else "-100"
        for number in range(random.choice((1, 1, 2))):
            lines.append(f"chain {hook}{number} {{ type nat hook {hook} priority {priority} "
                         f"+ {number}; policy accept;")  # fmt: skip
            lines += [
                _nft_rule(random, hook, unclear, fib, has_sets) for _ in range(random.randrange(5))
            ]
            lines.append("}")
    return "\n".join([*lines, "}", ""]).replace("-100 + 0", "-100").replace("-100 + 1", "-99")


def _nft_rule(random: Random, chain: str, unclear: bool, fib: bool, has_sets: bool) -> str:
    matches = [
        _nft_match(random, unclear, fib, has_sets, chain)
        for _ in range(random.choice((0, 1, 1, 2)))
    ]
    return " ".join([*matches, _nft_end(random, chain)])


def _nft_match(random: Random, unclear: bool, fib: bool, has_sets: bool, chain: str) -> str:
    inverted = random.choice(("", "!= "))
    nets = ", ".join(random.sample(NETWORKS[4:8], 2))
    choices = [
        f"ip saddr {inverted}{random.choice(NETWORKS)}",
        f"ip daddr {inverted}{random.choice(NETWORKS)}",
        f"ip daddr {inverted}{{ 10.2.0.9, 10.3.0.7 }}",
        f"ip daddr {{ {random.choice(NETWORKS[4:8])} }}",
        f"udp dport {inverted}{random.choice(PORTS)}",
        "udp dport { 53, 400-500 }",
        f"meta mark {inverted}{random.choice(MARKS)}",
        "meta mark & 0x1 == 0x1",
        "meta l4proto udp",
        "ct state new", "ct state established",
        "counter",
        "rt ipsec missing" if chain == "postrouting" else "counter",
        "ip saddr . udp dport { 10.0.0.1 . 80, 172.17.0.2 . 443, 10.0.0.9 . 53 }",
    ]  # fmt: skip
    if nets and chain in ("prerouting", "postrouting", "output"):
        choices.append(f'oifname {inverted}"d{random.randrange(3)}"' if chain != "prerouting"
                       else f'iifname {inverted}"d{random.randrange(3)}"')  # fmt: skip
    if chain == "postrouting":
        choices.append(f"oif {inverted}d1")
    if has_sets:
        choices += [
            f"ip saddr {inverted}@nets",
            f"ip daddr {inverted}@nets",
            "ip daddr . udp dport @pairs",
        ]
    if fib:
        choices += [f"fib daddr type {inverted}local", f"fib saddr type {inverted}local"]
    if unclear:
        choices += ["limit rate 1/second", "numgen random mod 2 == 0", "ip ttl 64", "ct mark 0"]
    return random.choice(choices)


def _nft_end(random: Random, chain: str) -> str:
    if chain.startswith("user"):
        last = "goto user2" if chain == "user1" else "drop"
        marks = ("meta mark set 0x5", "meta mark set meta mark | 0x2")
        return random.choice(("return", "accept", *marks, "counter", last))
    if random.random() < 0.5:
        jumps = ("jump user1", "jump user2", "goto user1")
        verdicts = "udp dport vmap { 53 : accept, 80-90 : jump user1, 443 : drop }"
        return random.choice((*jumps, "meta mark set 0x1", "accept", verdicts))
    if chain == "postrouting":
        return random.choice((
            "masquerade", f"snat to {random.choice(SNATS)}", "snat to 192.0.2.1-192.0.2.8",
            "snat to ip saddr map { 10.0.0.1 : 192.0.2.7, 172.17.0.2 : 192.0.2.8 }",
        ))  # fmt: skip
    return random.choice((
        f"dnat to {random.choice(DNATS)}", f"udp dport 80 dnat to {random.choice(DNATS)}:8080",
        "dnat ip to udp dport map { 80 : 10.3.0.7, 443 : 203.0.113.5 }",
        "dnat ip to udp dport map { 53 : 10.3.0.7 . 5353, 8080 : 203.0.113.5 . 80 }",
    ))  # fmt: skip


def iptables(random: Random, *, unclear: bool) -> str:
    """Return a nat table, and sometimes a mangle table that sets marks."""
    lines = ["*nat", ":U1 - [0:0]", ":U2 - [0:0]"]
    for chain in ("U1", "U2", "PREROUTING", "OUTPUT", "POSTROUTING"):
        lines += [_rule(random, chain, unclear) for _ in range(random.randrange(5))]
    lines.append("COMMIT")
    lines.append("*mangle")
    if random.random() < 0.3:
        lines.append("-A OUTPUT -p udp --dport 443 -j MARK --set-mark 2")
    return "\n".join([*lines, "COMMIT", ""])


def _rule(random: Random, chain: str, unclear: bool) -> str:
    matches = [_match(random, chain, unclear) for _ in range(random.choice((0, 1, 1, 2)))]
    # Each kind of match once; the protocol first, for the matches of ports.
    kinds = {(kind := KIND.search(match)) and kind[0]: match for match in matches}
    text = " ".join(["-p udp", *sorted(kinds.values(), key=lambda match: "-m" in match)])
    return f"-A {chain} {text} {_end(random, chain)}"


def _match(random: Random, chain: str, unclear: bool) -> str:
    inverted = random.choice(("", "! "))
    choices = [
        f"-m comment --comment {random.choice(('one', 'two'))}",
        f"-m mark {inverted}--mark {random.choice(MARKS)}/0x7",
        "-m conntrack --ctstate NEW", "-m state --state ESTABLISHED",
        f"-m addrtype {inverted}--dst-type LOCAL",
        f"-m addrtype {inverted}--src-type LOCAL",
        f"-m multiport {inverted}--{'ports 53,400:500' if unclear else 'sports 53,10000:10400'}",
        f"-m iprange {inverted}--dst-range 10.2.0.0-10.2.0.63",
    ]  # fmt: skip
    if chain == "POSTROUTING":
        choices += ["-m policy --dir out --pol none", "-m policy --dir out --pol ipsec"]
    if unclear:
        choices += ["-m statistic --mode random --probability 0.5", "-m limit --limit 1/s",
                    "-m ttl --ttl-eq 64"]  # fmt: skip
    simple = {
        "-s": random.choice(NETWORKS),
        "-d": random.choice(NETWORKS),
        "--dport": random.choice(PORTS).replace("-", ":"),
    }
    choices += [f"{inverted}{key} {text}" for key, text in simple.items()]
    if chain in ("POSTROUTING", "OUTPUT"):
        choices.append(f"{inverted}-o {random.choice(('d0', 'd1', 'd+'))}")
    if chain == "PREROUTING":
        choices.append(f"{inverted}-i {random.choice(('d0', 'd2', 'd+'))}")
    return random.choice(choices)


def _end(random: Random, chain: str) -> str:
    if chain in ("U1", "U2"):
        return random.choice(("-j RETURN", "-j ACCEPT", "-j MARK --set-xmark 0x5/0x5", "",
                              "-g U2" if chain == "U1" else "-j RETURN"))  # fmt: skip
    if random.random() < 0.5:
        return random.choice(("-j U1", "-j U2", "-g U1", "-j MARK --set-mark 1", "-j ACCEPT"))
    if chain == "POSTROUTING":
        return random.choice(("-j MASQUERADE", "-j SNAT --to-source 192.0.2.1",
                              "-j SNAT --to-source 192.0.2.1-192.0.2.8"))  # fmt: skip
    return random.choice((f"-j DNAT --to-destination {random.choice(DNATS)}",
                          f"-j DNAT --to-destination {random.choice(DNATS)}:8080",
                          f"-j DNAT --to-destination :{random.choice(('80', '443'))}"))  # fmt: skip
