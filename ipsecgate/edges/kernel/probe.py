"""Find out what the kernel supports, without changing this host."""

from __future__ import annotations

import os
import socket
import sys
from functools import cache

from ipsecgate import trust
from ipsecgate.errors import GateError

NETLINK_XFRM = 6
SO_NETNS_COOKIE = 71  # asm-generic/socket.h


def netns_cookie() -> int:
    """Return the cookie of the calling thread's network namespace, which is unique until reboot."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), sys.byteorder)


def has_xfrm() -> bool:
    """Return whether the kernel has the XFRM netlink family."""
    try:
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_XFRM).close()
    except OSError:
        return False
    return True


@cache
def has_esp() -> bool:
    """Return whether the kernel accepts an ESP state; tried in a new network namespace.

    Either of the two ciphers that strongSwan proposes first is enough. False if this process may
    not create a network namespace. Raises: GateError if ip(8) or unshare(1) is missing.
    """
    import shutil  # noqa: PLC0415 - the controller has no use for its 0.4 MiB

    aead = ("aead", "rfc4106(gcm(aes))", "0x" + "11" * 20, "128")
    cbc = ("enc", "cbc(aes)", "0x" + "11" * 16, "auth", "hmac(sha256)", "0x" + "11" * 32)
    for tool in ("ip", "unshare"):
        if shutil.which(tool, path=trust.ENVIRONMENT["PATH"]) is None:
            raise GateError(f"{tool} is not installed", hint="apt install iproute2 util-linux")
    namespace = ["unshare", "--net"]
    if os.geteuid() != 0:
        namespace += ["--user", "--map-root-user"]
    state = "ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x100 mode tunnel"
    return any(
        trust.run([*namespace, *state.split(), *algorithm]).returncode == 0
        for algorithm in (aead, cbc)
    )
