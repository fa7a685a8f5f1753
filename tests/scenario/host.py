"""In the guest: set a host up, and run the commands that appear in the results folder.

The folder is shared with the machine outside, which writes N.sh (complete when it gets that name);
we write N.out while it runs, and N.code at its end. The file `stop` ends the host.

    python -m tests.scenario.host NAME FOLDER
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from tests.scenario.faults import FAULTS, Fault
from tests.screens.gated_host import GatedHost

SWANCTL = Path("/etc/swanctl/conf.d/db.conf")
SERVER = ("10.2.0.5", 5432)
LIMIT = 120  # seconds for one command
PAUSE = 0.05
CONNECTION = """\
connections {{
  db {{
    version = 2
    local_addrs = {local_addr}
    remote_addrs = {remote_addr}
    proposals = aes128-sha256-modp2048
    local {{
      auth = psk
      id = {local_id}
    }}
    remote {{
      auth = psk
      id = {remote_id}
    }}
    children {{
      db-net {{
        mode = tunnel
        local_ts = {local_ts}
        remote_ts = {remote_ts}
        esp_proposals = aes128-sha256
        start_action = none
      }}
    }}
  }}
}}
secrets {{
  ike-db {{
    id-local = shop.example
    id-peer = db.example
    secret = "{psk}"
  }}
}}
"""


class Shop(GatedHost):
    """A host whose service webshop-worker uses a database behind an IPsec peer."""

    def __init__(self, fault: Fault) -> None:
        super().__init__("ipsecgate-scenario", fault.config, ["10.2.0.0/16"], [SERVER[0]])
        self.fault = fault

    def __enter__(self) -> Self:
        super().__enter__()
        lab, networks = self.lab, (self.fault.local, "10.2.0.0/16")
        lab.a.namespace.try_sa(lab.a.outer[4], lab.b.outer[4])  # loads the ciphers
        ends = ((str(lab.a.outer[4]), "shop.example"), (str(lab.b.outer[4]), "db.example"))
        peer = Path(lab.b.charon.folder / "db.conf")
        for file, key, order in ((SWANCTL, "the key of both", 1), (peer, self.fault.psk, -1)):
            (local_addr, local_id), (remote_addr, remote_id) = ends[::order]
            local_ts, remote_ts = networks[::order]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(
                CONNECTION.format(
                    local_addr=local_addr,
                    remote_addr=remote_addr,
                    local_id=local_id,
                    remote_id=remote_id,
                    local_ts=local_ts,
                    remote_ts=remote_ts,
                    psk=key,
                )
            )
        load = ["swanctl", "--load-all", "--noprompt", "--clear"]
        lab.a.run(load)
        lab.b.run([*load, "--uri", f"unix://{lab.b.charon.vici_socket}", "--file", str(peer)])
        lab.b.serve("tcp-server", SERVER[1])
        self._files()
        self.start()
        self.knock("webshop", 3600, ("127.0.0.1", 80))
        self.knock("webshop-worker", 5, SERVER)
        return self

    def _files(self) -> None:
        """Put the program on the path, and the logs where they are expected."""
        Path("/usr/local/bin/ipsecgate").write_text(
            f'#!/bin/sh\nexec {sys.executable} -P -m ipsecgate "$@"\n'
        )
        Path("/usr/local/bin/ipsecgate").chmod(0o755)
        Path("/etc/strongswan.d/swanctl-plugins.conf").write_text("swanctl { load = random }\n")
        log = Path("/var/log/charon.log")
        log.unlink(missing_ok=True)
        log.symlink_to(self.lab.a.charon.log)

    def execute(self, script: Path) -> None:
        """Run one command of the investigator in host a."""
        environment = {
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": "/root",
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "COLUMNS": "100",
        }
        with script.with_suffix(".out").open("w") as out:
            done = subprocess.run(
                [*self.lab.a.launcher(), "timeout", str(LIMIT), "sh", str(script)],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                cwd="/root",
                env=environment,
                check=False,
            )
        code = script.with_suffix(".part")
        code.write_text(str(done.returncode))
        code.rename(script.with_suffix(".code"))


def scripts(folder: Path) -> Iterator[Path]:
    """Yield each new script in the folder, until `stop` appears there."""
    seen: set[Path] = set()
    while not (folder / "stop").exists():
        for script in sorted({*folder.glob("*.sh")} - seen):
            seen.add(script)
            yield script
        time.sleep(PAUSE)


def main() -> int:
    name, folder = sys.argv[1], Path(sys.argv[2])
    with Shop(FAULTS[name]) as shop:
        (folder / "ready").touch()
        for script in scripts(folder):
            shop.execute(script)
    return 0


if __name__ == "__main__":
    sys.exit(main())
