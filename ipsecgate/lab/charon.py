"""One strongSwan daemon of the lab: its process, its settings, and its connections over VICI.

Rules of this module: nothing outside the given folder is written. Connections exist only in the
daemon, so a restarted one has none. Every call opens its own VICI connection, so the daemon may
restart between two calls, and threads may call.

Retransmission: by default charon tries 5 times from 4 s on and gives up after 165 s. The lab
retransmits every 1.5 s and gives up after 15 s, because a busy machine may delay a charon's answer.
`HASTY` makes charon give up after 3 s, for tests with a silent peer. Requests that are answered
within 1.5 s (a one-way delay below 700 ms) are not affected. All other settings are the defaults.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import vici
from vici.exception import CommandException, SessionException

from ipsecgate.lab.netns import LabError

DAEMON = Path("/usr/sbin/charon-systemd")
PLUGINS = Path("/usr/lib/ipsec/plugins")
# Only what PSK with the lab's proposals needs: in a slow guest each plugin costs start-up time, and
# af-alg would probe every cipher of the kernel.
LOAD = "random nonce {crypto} {kernel} socket-default vici"
# The crypto plugins: since Debian 13, libstrongswan has OpenSSL instead of strongSwan's own.
CRYPTO = ("aes sha1 sha2 hmac kdf gmp", "openssl")
# charon uses the first plugin with an IPsec backend; kernel-netlink also does the routes.
NETLINK, LIBIPSEC = "kernel-netlink", "kernel-libipsec kernel-netlink"
TUN = Path("/dev/net/tun")
START_TIMEOUT = 60.0
OTHERS_TIMEOUT = 5.0
HASTY = "retransmit_tries = 1"  # for `Charon.configure`

SETTINGS = """\
charon-systemd {{
  load = {load}
  retransmit_tries = 9
  retransmit_timeout = 1.5
  retransmit_base = 1.0
  plugins {{
    vici {{
      socket = unix://{folder}/vici
    }}
  }}
  filelog {{
    lab {{
      path = {folder}/charon.log
      time_format = %H:%M:%S
      time_add_ms = yes
      flush_line = yes
      default = 1
    }}
  }}
  journal {{
    default = -1
  }}
}}
"""


class Charon:
    """A charon-systemd with all its files in one folder.

    `launcher` is the command prefix that runs it in its network namespace. `libipsec`: userspace
    ESP behind a TUN device, ipsec0, in tunnel mode only; the kernel needs no ESP.
    """

    def __init__(self, folder: Path, launcher: list[str], libipsec: bool = False) -> None:
        self.folder = folder
        self.vici_socket = folder / "vici"
        self.log = folder / "charon.log"
        self._launcher = launcher
        self._process: subprocess.Popen[bytes] | None = None
        self._load = plugins(LIBIPSEC if libipsec else NETLINK)
        missing = missing_plugins(self._load)
        if missing or not DAEMON.exists():
            raise LabError(
                f"strongSwan is incomplete: {' '.join(missing) or DAEMON} is missing",
                hint="install charon-systemd, strongswan-libcharon, libstrongswan and "
                "libcharon-extra-plugins",
            )
        if libipsec and not TUN.exists():
            load_tun()
        self._settings = folder / "strongswan.conf"
        self._settings.write_text(SETTINGS.format(load=self._load, folder=folder))

    @property
    def pid(self) -> int:
        """The daemon's process id. Raises: LabError if it was not started."""
        if self._process is None:
            raise LabError("charon was not started")
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the daemon is running."""
        return self._process is not None and self._process.poll() is None

    def spawn(self, launcher: list[str] | None = None) -> None:
        """Start the daemon without waiting for it; `launcher` replaces the usual one."""
        self.vici_socket.unlink(missing_ok=True)
        with (self.folder / "charon.out").open("wb") as out:
            self._process = subprocess.Popen(
                [*(launcher or self._launcher), str(DAEMON)],
                env={"STRONGSWAN_CONF": str(self._settings)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    def wait_ready(self) -> None:
        """Wait until VICI answers. Raises: LabError with the end of the daemon's output."""
        deadline = time.monotonic() + START_TIMEOUT
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                break
            with contextlib.suppress(OSError), self.session() as session:
                session.version()
                return
            time.sleep(0.01)
        output = (self.folder / "charon.out").read_text(errors="replace")[-500:]
        raise LabError(f"charon did not become ready: {output.strip()}", hint=f"see {self.log}")

    def kill(self) -> None:
        """Kill the daemon as a crash would (SIGKILL): its SAs and policies stay."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def stop(self) -> None:
        """Stop the daemon as systemd would (SIGTERM); it deletes its SAs and policies."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()

    @contextlib.contextmanager
    def session(self) -> Iterator[vici.Session]:
        """Open a new VICI connection. Raises: OSError if the daemon is not running."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(self.vici_socket))
            try:
                yield vici.Session(sock)
            except SessionException as error:
                # vici's clean-up fails on the pending answer to an interrupted request.
                if isinstance(error.__context__, KeyboardInterrupt):
                    raise error.__context__ from None
                raise

    def configure(self, settings: str) -> None:
        """Add these lines to the lab's settings, in place of those of the last call, and reload.

        charon reads some while it runs, such as make_before_break, and others only at its start.
        """
        own = SETTINGS.format(load=self._load, folder=self.folder)
        self._settings.write_text(f"{own}charon-systemd {{\n{settings}\n}}\n")
        with self.session() as session:
            session.reload_settings()

    def load(self, section: Mapping[str, Any]) -> None:
        """Load a connection, see `connections.connection`. Raises: CommandException."""
        with self.session() as session:
            session.load_conn(dict(section))

    def load_psk(self, key: str) -> None:
        """Load the pre-shared key for all identities; it replaces the last one."""
        with self.session() as session:
            session.load_shared({"id": "lab", "type": "IKE", "data": key})

    def unload(self, name: str) -> None:
        """Unload a connection and its trap policies; its SAs stay."""
        with self.session() as session:
            session.unload_conn({"name": name})

    def loaded(self) -> list[str]:
        """Return the names of the loaded connections."""
        with self.session() as session:
            return [name for conn in session.list_conns() for name in conn]

    def initiate(self, child: str, timeout: float = 30.0) -> None:
        """Negotiate a child and wait for it. Raises: CommandException if it fails.

        If a gate initiates at the same time, there are two IKE_SAs and the peer keeps only one. So
        if ours fails, a child from the other one counts as success.
        """
        with self.session() as session:
            try:
                list(session.initiate({"child": child, "timeout": str(int(timeout * 1000))}))
            except CommandException:
                if not self._comes_up(child):
                    raise

    def _comes_up(self, child: str) -> bool:
        """Return whether an existing IKE_SA establishes the child soon."""
        deadline = time.monotonic() + OTHERS_TIMEOUT
        while not self.idle() and time.monotonic() < deadline:
            if child in self.established():
                return True
            time.sleep(0.05)
        return False

    def terminate(self, child: str, timeout: float = 30.0) -> None:
        """Delete a child and notify the peer, as an operator would. Raises: CommandException."""
        with self.session() as session:
            list(session.terminate({"child": child, "timeout": str(int(timeout * 1000))}))

    def rekey(self, child: str) -> None:
        """Start to replace a child's SAs with new ones. Raises: CommandException."""
        with self.session() as session:
            session.rekey({"child": child})

    def drop_all(self) -> None:
        """Drop every IKE_SA and its children, without waiting for the peer's answer."""
        with self.session() as session:
            ids = [sa["uniqueid"] for each in session.list_sas() for sa in each.values()]
            for unique in ids:
                with contextlib.suppress(CommandException):
                    list(session.terminate({"ike-id": unique, "force": "yes", "timeout": "-1"}))

    def idle(self) -> bool:
        """Return whether there is no IKE_SA, not even a half-open one."""
        with self.session() as session:
            return not any(session.list_sas())

    def busy(self, names: Iterable[str]) -> bool:
        """Return whether these connections have any active or queued task except DPD."""
        wanted = set(names)
        with self.session() as session:
            tasks = {
                task
                for each in session.list_sas()
                for name, sa in each.items()
                if name in wanted
                for key in ("tasks-active", "tasks-queued")
                for task in sa.get(key, ())
            }
        return bool(tasks - {b"IKE_DPD"})

    def established(self) -> tuple[str, ...]:
        """Return the names of the children whose SAs are installed."""
        with self.session() as session:
            return tuple(
                child["name"].decode()
                for each in session.list_sas()
                for sa in each.values()
                for child in sa["child-sas"].values()
                if child["state"] == b"INSTALLED"
            )


def plugins(kernel: str) -> str:
    """Return the plugins to load: this kernel backend, and the crypto plugins installed here."""
    crypto = min(CRYPTO, key=lambda names: len(missing_plugins(names)))
    return LOAD.format(crypto=crypto, kernel=kernel)


def missing_plugins(names: str) -> list[str]:
    """Return the plugins that are not installed where Debian keeps them."""
    return [name for name in names.split() if not (PLUGINS / f"libstrongswan-{name}.so").exists()]


def load_tun() -> None:
    """Load the tun module, unless it is built in; without either, opening a TUN device fails."""
    subprocess.run(["modprobe", "tun"], check=False, capture_output=True)
