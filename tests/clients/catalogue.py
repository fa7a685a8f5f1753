"""The real clients: their command lines, and a part of their output when they are served.

None is configured to retry, and none knows about the gate.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.clients.daemons import GIT, HTTP, PAGE, POSTGRES, REDIS, SSH

BUILT = Path(__file__).parents[2] / ".cache/clients"
"""The clients in Go and Java, which packaging/setup.sh compiles."""
PYTHON = "/usr/bin/python3"
REQUEST = r"GET / HTTP/1.0\r\n\r\n"

URLLIB = """\
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1]).read().decode())
"""
ASYNCIO = r"""
import asyncio, sys
async def main():
    reader, writer = await asyncio.open_connection(sys.argv[1], int(sys.argv[2]))
    writer.write(b"GET / HTTP/1.0\r\n\r\n")
    print((await reader.read()).decode())
asyncio.run(main())
"""
NODE = """\
require("http").get(process.argv[1], answer => answer.pipe(process.stdout));
"""
PERL = r"""
use IO::Socket::INET;
my $socket = IO::Socket::INET->new(PeerAddr => $ARGV[0], PeerPort => $ARGV[1]) or die "$!\n";
print $socket "GET / HTTP/1.0\r\n\r\n";
print while <$socket>;
"""
BASH = r"""
set -e
exec 3<>"/dev/tcp/$0/$1"
printf 'GET / HTTP/1.0\r\n\r\n' >&3
cat <&3
"""
SSH_OPTIONS = (
    "-F none -o BatchMode=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
    " -o IdentitiesOnly=yes -o LogLevel=ERROR"
)


@dataclass(frozen=True, slots=True)
class RealClient:
    """A client as its user would call it. `served`: a part of its output after a success.

    `vague`: messages of a failed connection without the cause: those of curl 7 and 8 for exit code
    7.
    """

    name: str
    argv: tuple[str, ...]
    served: str = PAGE
    vague: tuple[str, ...] = ("Couldn't connect to server", "Could not connect to server")


def piped(program: str, to: str) -> tuple[str, ...]:
    """Return the argv of a netcat that requests the page."""
    return ("sh", "-c", f"printf '{REQUEST}' | {program} {to} {HTTP}")


def catalogue(to: str, key: Path) -> list[RealClient]:
    """Return the clients, which all connect to the address `to`; `key` is ssh's private key."""
    url = f"http://{to}:{HTTP}/"
    http = str(HTTP)
    ssh = ("ssh", *SSH_OPTIONS.split(), "-i", str(key), "-p", str(SSH), f"root@{to}")
    psql = ("psql", "-h", to, "-p", str(POSTGRES), "-U", "postgres", "-XAtc", "select 'row ' || 42")
    java = ("java", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-cp", str(BUILT), "Dial")
    return [
        RealClient("curl", ("curl", "-sS", url)),
        RealClient("wget", ("wget", "-nv", "--tries=1", "-O", "-", url)),
        RealClient("git", ("git", "ls-remote", f"git://{to}:{GIT}/repository"), "refs/heads/main"),
        RealClient("git, HTTP", ("git", "ls-remote", f"{url}repository/.git"), "refs/heads/main"),
        RealClient("ssh", (*ssh, "echo", "a shell"), "a shell"),
        RealClient("psql", psql, "row 42"),
        RealClient("redis-cli", ("redis-cli", "-h", to, "-p", str(REDIS), "ping"), "PONG"),
        RealClient("Python urllib", (PYTHON, "-c", URLLIB, url)),
        RealClient("Python asyncio", (PYTHON, "-c", ASYNCIO, to, http)),
        RealClient("node", ("node", "-e", NODE, url)),
        RealClient("Java", (*java, to, http)),
        RealClient("Go, static", (str(BUILT / "dial"), f"{to}:{http}")),
        RealClient("perl", ("perl", "-e", PERL, to, http)),
        RealClient("nc", piped("nc.openbsd -vN", to)),
        RealClient("ncat", piped("ncat", to)),
        RealClient("busybox wget", ("busybox", "wget", "-q", "-O", "-", url)),
        RealClient("busybox nc", piped("busybox nc", to)),
        RealClient("bash", ("bash", "-c", BASH, to, http)),
    ]
