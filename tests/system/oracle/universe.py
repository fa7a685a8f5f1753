"""The addresses of all worlds."""

from __future__ import annotations

from ipaddress import ip_address

from ipsecgate.core.model.flow import Address

LOCAL: dict[int, list[Address]] = {
    4: [ip_address(f"198.51.100.{n}") for n in (9, 10, 11, 12)],
    6: [ip_address(f"2001:db8:a::{n:x}") for n in (9, 10, 11, 12)],
}
REMOTE: dict[int, list[Address]] = {
    4: [ip_address(f"203.0.113.{n}") for n in range(8, 16)],
    6: [ip_address(f"2001:db8:b::{n:x}") for n in range(8, 16)],
}
# The ends of tunnel SAs: on this host, and beyond the wire.
NEAR: dict[int, list[Address]] = {
    4: [ip_address("192.0.2.1"), ip_address("192.0.2.2")],
    6: [ip_address("2001:db8::1"), ip_address("2001:db8::2")],
}
FAR: dict[int, list[Address]] = {
    4: [ip_address("192.0.2.129"), ip_address("192.0.2.130")],
    6: [ip_address("2001:db8::81"), ip_address("2001:db8::82")],
}
# The one address of the container.
INSIDE: dict[int, Address] = {4: ip_address("198.51.100.14"), 6: ip_address("2001:db8:a::e")}
