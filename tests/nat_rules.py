# ruff: noqa: E501  rules as the tools write them
"""The NAT rules that tools of the field make, and a record of how the kernel lists them.

`python -m tests.nat_rules` loads each into a namespace of its own and records what the kernel
answers, in `RECORD`. It needs root, nft, iptables, and a kernel with nftables.
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import subprocess
import zlib
from functools import partial
from pathlib import Path
from typing import Any

from ipsecgate.core.codec import iptables, nftables
from ipsecgate.core.model.nat import ChainName, Rule, Ruleset, Set
from ipsecgate.edges.kernel.nat import NatRules
from ipsecgate.edges.kernel.netlink import Requests
from ipsecgate.lab.netns import Namespace

RECORD = Path(__file__).with_name("nat_rules.json")

DOCKER = """*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80
COMMIT
"""
NETAVARK = """*nat
:NETAVARK-1D8721804F16F - [0:0]
:NETAVARK-HOSTPORT-MASQ - [0:0]
-A POSTROUTING -j NETAVARK-HOSTPORT-MASQ
-A POSTROUTING -s 10.88.0.0/16 -j NETAVARK-1D8721804F16F
-A NETAVARK-1D8721804F16F -d 10.88.0.0/16 -j ACCEPT
-A NETAVARK-1D8721804F16F ! -d 224.0.0.0/4 -j MASQUERADE
-A NETAVARK-HOSTPORT-MASQ -m comment --comment "portfw masq mark" -m mark --mark 0x2000/0x2000 -j MASQUERADE
COMMIT
"""
LIBVIRT = """*nat
:LIBVIRT_PRT - [0:0]
-A POSTROUTING -j LIBVIRT_PRT
-A LIBVIRT_PRT -s 192.168.122.0/24 -d 224.0.0.0/24 -j RETURN
-A LIBVIRT_PRT -s 192.168.122.0/24 -d 255.255.255.255/32 -j RETURN
-A LIBVIRT_PRT -s 192.168.122.0/24 ! -d 192.168.122.0/24 -p tcp -j MASQUERADE --to-ports 1024-65535
-A LIBVIRT_PRT -s 192.168.122.0/24 ! -d 192.168.122.0/24 -p udp -j MASQUERADE --to-ports 1024-65535
-A LIBVIRT_PRT -s 192.168.122.0/24 ! -d 192.168.122.0/24 -j MASQUERADE
COMMIT
"""
KUBE_PROXY = """*nat
:KUBE-MARK-MASQ - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-TCOU7JCQXEZGVUNU - [0:0]
:KUBE-SEP-A - [0:0]
:KUBE-SEP-B - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic" -j MASQUERADE --random-fully
-A KUBE-SERVICES -d 10.96.0.10/32 -p udp -m comment --comment "dns cluster IP" -m udp --dport 53 -j KUBE-SVC-TCOU7JCQXEZGVUNU
-A KUBE-SVC-TCOU7JCQXEZGVUNU ! -s 10.244.0.0/16 -d 10.96.0.10/32 -p udp -m udp --dport 53 -j KUBE-MARK-MASQ
-A KUBE-SVC-TCOU7JCQXEZGVUNU -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-A
-A KUBE-SVC-TCOU7JCQXEZGVUNU -j KUBE-SEP-B
-A KUBE-SEP-A -s 10.244.0.3/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-A -p udp -m udp -j DNAT --to-destination 10.244.0.3:53
-A KUBE-SEP-B -s 10.244.0.4/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-B -p udp -m udp -j DNAT --to-destination 10.244.0.4:53
COMMIT
"""
SPARED = """*nat
-A POSTROUTING -m policy --dir out --pol ipsec -j ACCEPT
-A POSTROUTING -j MASQUERADE
COMMIT
"""
KUBE_PROXY_NFT = """table ip kube-proxy {
 map service-ips {
  type ipv4_addr . inet_proto . inet_service : verdict
  elements = { 10.96.0.10 . udp . 53 : goto service-dns }
 }
 chain mark-for-masquerade { meta mark set meta mark | 0x4000; }
 chain masquerading { meta mark & 0x4000 == 0 return; meta mark set meta mark ^ 0x4000; masquerade fully-random; }
 chain services { ip daddr . meta l4proto . th dport vmap @service-ips; }
 chain service-dns {
  ip daddr 10.96.0.10 udp dport 53 ip saddr != 10.244.0.0/16 jump mark-for-masquerade
  numgen random mod 2 vmap { 0 : goto ep-a, 1 : goto ep-b }
 }
 chain ep-a { ip saddr 10.244.0.3 jump mark-for-masquerade; meta l4proto udp dnat to 10.244.0.3:53; }
 chain ep-b { ip saddr 10.244.0.4 jump mark-for-masquerade; meta l4proto udp dnat to 10.244.0.4:53; }
 chain nat-output { type nat hook output priority -100; jump services; }
 chain nat-prerouting { type nat hook prerouting priority dstnat; jump services; }
 chain nat-postrouting { type nat hook postrouting priority srcnat; jump masquerading; }
}
"""
FIREWALLD = """table inet firewalld {
 chain nat_POSTROUTING { type nat hook postrouting priority srcnat + 10; policy accept; jump zones; }
 chain zones { oifname "eth0" goto nat_POST_public; goto nat_POST_trusted; }
 chain nat_POST_public { jump nat_POST_public_allow; }
 chain nat_POST_public_allow { meta nfproto ipv4 oifname != "lo" masquerade; }
 chain nat_POST_trusted { }
}
"""
BY_HAND = """table ip nat {
 set inside { type ipv4_addr; flags interval; elements = { 10.1.0.0/16, 192.168.0.0-192.168.3.255 } }
 chain post {
  type nat hook postrouting priority 100
  rt ipsec exists accept
  ip saddr @inside oifname "eth0" snat to 192.0.2.7
 }
}
"""
RULES = {
    "docker": ("iptables-nft-restore", DOCKER),
    "docker-legacy": ("iptables-legacy-restore", DOCKER),
    "netavark": ("iptables-nft-restore", NETAVARK),
    "libvirt": ("iptables-nft-restore", LIBVIRT),
    "libvirt-legacy": ("iptables-legacy-restore", LIBVIRT),
    "kube-proxy": ("iptables-nft-restore", KUBE_PROXY),
    "kube-proxy-legacy": ("iptables-legacy-restore", KUBE_PROXY),
    "kube-proxy-nft": ("nft -f -", KUBE_PROXY_NFT),
    "spared": ("iptables-nft-restore", SPARED),
    "spared-legacy": ("iptables-legacy-restore", SPARED),
    "firewalld": ("nft -f -", FIREWALLD),
    "by-hand": ("nft -f -", BY_HAND),
}
LISTS = {"tables": nftables.GETTABLE, "chains": nftables.GETCHAIN, "rules": nftables.GETRULE,
         "sets": nftables.GETSET}  # fmt: skip


def recorded() -> dict[str, dict[str, list[bytes]]]:
    """Return what was recorded: datagrams by kind of object, for each name in `RULES`."""
    document = json.loads(RECORD.read_text())
    return {
        name: {kind: [zlib.decompress(base64.b64decode(one)) for one in datagrams]
               for kind, datagrams in parts.items()}
        for name, parts in document.items()
    }  # fmt: skip


def ruleset(parts: dict[str, list[bytes]]) -> Ruleset:
    """Decode a record."""
    if "legacy" in parts:
        info, blob = parts["legacy"]
        return iptables.decode_table("nat", 4, iptables.decode_info(info), blob)
    chains: dict[ChainName, list[Rule]] = {}
    for datagram in parts["rules"]:
        for name, rule in nftables.decode_rules(datagram):
            chains.setdefault(name, []).append(rule)
    sets = {}
    headers = [one for datagram in parts["sets"] for one in nftables.decode_sets(datagram)]
    for header in headers:
        datagrams = parts[f"elements of {header.name[1]}"]
        items = [item for one in datagrams for item in nftables.decode_elements(one)]
        sets[header.name] = Set(header.size, nftables.elements_of(header, items))
    return Ruleset(
        tuple(base for one in parts["chains"] for base in nftables.decode_bases(one)),
        {name: tuple(rules) for name, rules in chains.items()},
        sets,
    )


async def _record() -> dict[str, list[bytes]]:
    async with NatRules() as rules:
        legacy = rules._legacy
        if (4, "nat") in legacy.tables():
            return {"legacy": list(legacy._entries(4, "nat"))}
    found: dict[str, list[bytes]] = {}
    async with Requests(nftables.NETLINK_NETFILTER) as requests:
        for kind, number in LISTS.items():
            encode = partial(nftables.encode_list, number)
            found[kind] = await requests.dump(encode, lambda datagram: [datagram])
        for header in [one for each in found["sets"] for one in nftables.decode_sets(each)]:
            encode = partial(nftables.encode_elements, header.name)
            name = f"elements of {header.name[1]}"
            found[name] = await requests.dump(encode, lambda datagram: [datagram])
    return found


def main() -> None:
    document: dict[str, Any] = {}
    for name, (program, text) in RULES.items():
        space = Namespace(f"record-{os.getpid()}")
        try:
            with space.inside():
                subprocess.run(program.split(), input=text, text=True, check=True)
                parts = asyncio.run(_record())
        finally:
            space.remove()
        document[name] = {
            kind: [base64.b64encode(zlib.compress(one, 9)).decode() for one in datagrams]
            for kind, datagrams in parts.items()
        }
    RECORD.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
