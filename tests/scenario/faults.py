"""The mistakes, by the names of the hosts, which tell nothing."""

from __future__ import annotations

from dataclasses import dataclass

GOOD = """\
[gate]
cgroups = ["unit:webshop", "unit:webshop-worker"]

[[policy]]
name = "resolver"
remote = ["10.2.0.53"]
protocol = "udp"
port = "53"
action = "bypass"

[[policy]]
name = "db"
remote = ["10.2.0.0/16"]
protocol = "tcp"
port = "5432"
child = "db-net"
"""
SHADOW = """\
[[policy]]
name = "monitoring"
remote = ["10.2.0.0/24"]
action = "bypass"

"""
FIRST_POLICY = GOOD.index("[[policy]]")


@dataclass(frozen=True, slots=True)
class Fault:
    """`config`: of the gate. `local`: local_ts. `psk`: the peer's key. `clear`: what it causes."""

    config: str = GOOD
    local: str = "10.1.0.0/24"
    psk: str = "the key of both"
    clear: bool = False


HEALTHY = "fir"
FAULTS = {
    "alder": Fault(local="10.1.1.0/24"),
    "birch": Fault(config=GOOD.replace('"db-net"', '"dbnet"')),
    "cedar": Fault(psk="another key"),
    "dogwood": Fault(config=GOOD.replace(', "unit:webshop-worker"', ""), clear=True),
    "elm": Fault(config=GOOD[:FIRST_POLICY] + SHADOW + GOOD[FIRST_POLICY:], clear=True),
    HEALTHY: Fault(),
}
