"""Where a server listens: ADDRESS:PORT or unix:PATH."""

from __future__ import annotations

import re
from ipaddress import ip_address
from pathlib import Path
from reprlib import repr as short

from ipsecgate.core.model.value import value

_TCP = re.compile(r"(?:\[(?P<v6>[^\]]+)\]|(?P<v4>[0-9.]+)):(?P<port>[0-9]{1,5})")
PATH_LIMIT = 107  # bytes; source: unix(7), sun_path


@value
class Listen:
    """An address and a port, or the path of a UNIX socket; the other one is empty."""

    address: str = ""
    port: int = 0
    path: Path | None = None

    @classmethod
    def parse(cls, text: str) -> Listen:
        """Read 127.0.0.1:9765, [::1]:9765 or unix:/run/x.sock. Raises: ValueError."""
        kind, _, path = text.partition(":")
        if kind == "unix":
            if not path.startswith("/") or len(path.encode()) > PATH_LIMIT:
                raise ValueError(f"{short(text)}: write an absolute path after unix:")
            return cls(path=Path(path))
        found = _TCP.fullmatch(text)
        if found is None or not 0 < int(found["port"]) <= 0xFFFF:
            raise ValueError(f"{short(text)} is neither ADDRESS:PORT nor unix:PATH")
        try:
            address = ip_address(found["v6"] or found["v4"])
        except ValueError as error:
            raise ValueError(f"{short(text)} does not begin with an IP address") from error
        if (address.version == 6) is not bool(found["v6"]):
            raise ValueError(f"{short(text)}: write only an IPv6 address in brackets")
        return cls(str(address), int(found["port"]))

    def __str__(self) -> str:
        if self.path is not None:
            return f"unix:{self.path}"
        return (
            f"[{self.address}]:{self.port}"
            if ":" in self.address
            else f"{self.address}:{self.port}"
        )
