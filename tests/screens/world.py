"""The lab behind the screens: one gated host, and a policy in every state. See `CONFIG`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Self

from ipsecgate.core.model.flow import parse_address
from ipsecgate.lab.charon import Charon
from ipsecgate.lab.connections import ConnSpec, connection
from ipsecgate.lab.path import LINK
from tests.screens.gated_host import CONFIG_FILE, LOCAL, GatedHost, ip, named, program

CONFIG = """\
[gate]
cgroups = ["unit:webshop", "unit:reports"]

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

[[policy]]
name = "billing"
remote = ["10.3.0.0/16", "2001:db8:3::/48"]

[[policy]]
name = "warehouse"
remote = ["10.4.0.0/16"]

[[policy]]
name = "cache"
remote = ["10.5.0.0/16"]
protocol = "tcp"
port = "6379"
"""
# A change: cache is let go, archive is closed, and db protects every port.
NEW_CONFIG = (
    CONFIG.replace('name = "cache"', 'name = "archive"')
    .replace("10.5.0.0/16", "10.6.0.0/16")
    .replace('protocol = "tcp"\nport = "5432"\n', "")
)
BROKEN_CONFIG = CONFIG.replace('port = "5432"', 'prot = "5432"')
NEW_FILE, BROKEN_FILE = CONFIG_FILE.with_name("new.toml"), CONFIG_FILE.with_name("broken.toml")
UNITS = ("webshop", "reports")
NETWORKS = {
    "db": "10.2.0.0/16",
    "billing": "10.3.0.0/16",
    "warehouse": "10.4.0.0/16",
    "cache": "10.5.0.0/16",
}
FORGOTTEN = "2001:db8:3::/48"  # of billing, and in no connection
SILENT = "192.0.2.40"  # an address of host b from which nothing is sent
DB, BILLING, WAREHOUSE = ("10.2.0.5", 5432), ("10.3.0.7", 443), ("10.4.0.9", 443)
STATES = {
    "db/db": "covered",
    "billing/billing": "back-off",
    "warehouse/warehouse": "negotiating",
}


class World(GatedHost):
    """Host a with a gate, two gated units, and peers that answer, refuse and are silent.

    `settle()` waits for the state of the screens: db is covered, billing's key is wrong, the peer
    of warehouse is silent, nothing asked for cache, and one call is held.
    """

    def __init__(self) -> None:
        networks = (*NETWORKS.values(), FORGOTTEN)
        super().__init__("ipsecgate-screens", CONFIG, networks, [DB[0], BILLING[0]])

    def __enter__(self) -> Self:
        super().__enter__()
        b = self.lab.b.namespace.name
        ip(b, "address", "add", f"{SILENT}/24", "dev", LINK)
        ip(b, "rule", "add", "pref", "1", "from", SILENT, "blackhole")
        self.lab.a.namespace.try_sa(self.lab.a.outer[4], self.lab.b.outer[4])  # loads the ciphers
        for name, network in NETWORKS.items():
            spec = ConnSpec(name, "tunnel", local_ts=(f"{LOCAL[4]}/32",), remote_ts=(network,))
            self.lab.load(spec)
            if name == "warehouse":
                self._silence(spec)
        another_key(self.lab.b.charon, "billing")
        self.lab.b.serve("tcp-server", DB[1])
        for unit in UNITS:
            self.unit(unit)
        NEW_FILE.write_text(NEW_CONFIG)
        BROKEN_FILE.write_text(BROKEN_CONFIG)
        return self

    def _silence(self, spec: ConnSpec) -> None:
        """Load a connection whose peer has the silent address."""
        local = self.lab.a.end(spec, spec.local_ts)
        remote = replace(self.lab.b.end(spec, spec.remote_ts), address=parse_address(SILENT))
        self.lab.a.charon.load(connection(spec, local, remote, "none"))

    def edit(self) -> None:
        """Change the configuration, and reload nothing."""
        CONFIG_FILE.write_text(NEW_CONFIG)

    def settle(self) -> None:
        """Bring about the state that the class describes, and wait for it."""
        self.knock("webshop", 5, DB, WAREHOUSE)
        # One after the other, so that each run has the same history.
        self.wait(lambda: self.ask().get("sas"), "db is not covered")
        self.knock("reports", 1, BILLING)
        held = [*named("curl"), "1", WAREHOUSE[0], str(WAREHOUSE[1])]
        options = ("--cgroup", "unit:webshop", "--hold", "5m")
        with Path("/var/log/curl.log").open("a") as log:
            self.lab.a.popen(program("exec", *options, "--", *held), stdout=log)
        self.wait(lambda: self.settled, "the state of the screens does not come about")

    @property
    def settled(self) -> bool:
        """Whether the gate is in that state, and knows why those that failed did."""
        moment = self.moment
        return {child: state for child, state, _ in moment} == STATES and all(
            state == "covered" or attempts > 1 for _, state, attempts in moment
        )

    @property
    def moment(self) -> set[tuple[str, str, int]]:
        """Child, state and attempts of each negotiation; empty if no call is held.

        What was shown between two equal moments belongs to their state.
        """
        document = self.ask()
        items = document["negotiations"] if document.get("holds") else ()
        return {(item["child"], item["state"], item["attempts"]) for item in items}


def another_key(charon: Charon, name: str) -> None:
    """Give a daemon a different key for one connection, so that its authentication fails."""
    with charon.session() as session:
        session.load_shared(
            {
                "id": f"{name}-key",
                "type": "IKE",
                "data": "not the key of the peer",
                "owners": [f"{name}@a.example", f"{name}@b.example"],
            }
        )
