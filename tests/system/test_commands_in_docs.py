"""Every command of ipsecgate in the pages for operators is run as it is written, on a running gate.

The gate is host a's of the lab, with the default paths, and live SAs protect what the pages name.
tests/unit/test_commands_in_docs.py checks the commands of all pages without running them. Run it in
a guest or a room only.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ipsecgate.edges.host.cgroups import root
from ipsecgate.lab import cgroups
from ipsecgate.lab.connections import ConnSpec
from tests.screens.gated_host import LOCAL, GatedHost, program
from tests.screens.recording import record
from tests.unit.test_commands_in_docs import COMMAND, INLINE, ROOT, blocks, problem, words

pytestmark = pytest.mark.second_guest

NAMES = "operating monitoring containers holding troubleshooting faq your-network"
PAGES = [ROOT / "README.md", *(ROOT / f"docs/{name}.md" for name in NAMES.split())]
SYSTEMD = "needs systemd as process 1: tests/system/test_systemd.py"
IMAGE = "needs an image; with a folder in its place: tests/system/test_containers.py"
OTHERWISE = {
    "ipsecgate run": "the fixture runs it",
    "ipsecgate detach": "only named; docs/start.md has one in full: tests/system/test_start.py",
    "ipsecgate unit-dropin kubelet": SYSTEMD,
    "ipsecgate unit-dropin webshop --install": SYSTEMD,
    "ipsecgate exec -- podman run": IMAGE,
    "ipsecgate exec --cgroup /sys/fs/cgroup/gated/podman -- podman --cgroup-manager=cgroupfs run "
    "--cgroup-parent=/gated/containers IMAGE": IMAGE,
    "nsenter --net=/run/netns/blue ipsecgate -i blue --config /etc/ipsecgate/blue.toml run": (
        "needs another strongSwan: tests/system/test_instances.py"
    ),
}
"""Commands that are not run here, each with the reason and the test that does it."""
ENDLESS = (
    "ipsecgate top",
    "ipsecgate top --by cgroup",
    "ipsecgate metrics --listen",
    "ipsecgate -i NAME metrics --listen ADDRESS",
)
SILENT = ("ipsecgate wait", "ipsecgate metrics --output", "ipsecgate seccomp-profile >")
LAST = ("ipsecgate attach", "ipsecgate down", "ipsecgate unload")
"""How the commands begin that change the gate: they come last, in this order."""
CODES = {
    # Something is always amiss on a test kernel, and a lab has no units.
    "ipsecgate check": (0, 1),
    # About the last refusal, whatever it was.
    "ipsecgate why": (0, 1),
}
"""The exit codes of commands that may end with another one than 0."""
NEW = Path("/root/new.toml")
PLACEHOLDERS = {
    "FILE": str(NEW),
    "HOST:PORT": "10.2.0.5:5432",
    "SERVER:53/udp": "10.2.0.53:53/udp",
    "--container NAME": "--container webshop",
    "-i NAME": "-i default",
    "ADDRESS": "127.0.0.1:9765",
    "VERB": "status",
}
CONFIG = """\
[gate]
cgroups = ["unit:postgresql"]

[[policy]]
name = "resolver"
remote = ["10.2.0.53"]
protocol = "udp"
port = "53"
action = "bypass"

[[policy]]
name = "db"
remote = ["10.2.0.0/16"]
child = "net/net"
"""
NET = ConnSpec("net", "tunnel", local_ts=(f"{LOCAL[4]}/32",), remote_ts=("10.2.0.0/16",))
DB, WEB = ("10.2.0.5", 5432), ("10.2.0.9", 80)
BUNDLE = Path("/run/containerd/io.containerd.runtime.v2.task/default/webshop")
ENVIRONMENT = {"TERM": "xterm-256color", "LANG": "C.UTF-8", "HOME": "/root"}


def commands() -> list[str]:
    """Return each command once, with its shell's redirections and what follows it."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for line in blocks(text):
            if COMMAND.match(line) and not line.startswith("Exec"):  # of a unit
                found.append(re.sub(r"\s+#.*|^[$#] ", "", line).strip())
        squeezed = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
        found += [f"ipsecgate {line}" for line in INLINE.findall(re.sub(r"\s+", " ", squeezed))]
    return sorted(
        set(found), key=lambda line: ([line.startswith(each) for each in LAST[::-1]], line)
    )


def arguments(line: str) -> list[str]:
    """Return the arguments of ipsecgate in a command line."""
    found = words(line)
    return found[found.index("ipsecgate") + 1 :]


def filled(line: str) -> str:
    """Return a command with values in the place of placeholders, except PID."""
    for placeholder, value in PLACEHOLDERS.items():
        line = re.sub(rf"(?<![\w:]){re.escape(placeholder)}(?![\w:])", value, line)
    return line


WRITTEN = commands()
# The text may also name a verb alone that needs an argument, or an option of all verbs.
with contextlib.redirect_stdout(io.StringIO()):  # of --help
    WHOLE = [line for line in WRITTEN if not problem(arguments(line))]
RUN = {filled(line): line for line in WHOLE if line not in OTHERWISE}
"""The commands that are run, without placeholders, and how they are written."""


class Host(GatedHost):
    """The host that the pages describe: PostgreSQL and a web server behind host b, two services."""

    def __init__(self) -> None:
        super().__init__("ipsecgate-test-docs", CONFIG, ["10.2.0.0/16"], [DB[0], WEB[0]])

    def prepare(self) -> None:
        self.lab.load(NET)
        self.lab.b.serve("tcp-server", DB[1])
        page = Path(tempfile.mkdtemp(prefix="page-"))
        (page / "index.html").write_text("the page\n")
        self.lab.b.popen(["busybox", "httpd", "-f", "-p", f"{WEB[0]}:{WEB[1]}", "-h", str(page)])
        for name in ("postgresql", "webshop"):
            self.unit(name)
        with NEW.open("x") as file:
            file.write(f"# as it is\n{CONFIG}")
        Path("/var/lib/prometheus/node-exporter").mkdir(parents=True, exist_ok=True)
        with Path("/etc/hosts").open("a") as hosts:
            hosts.write(f"{DB[0]} db.example\n")
        BUNDLE.mkdir(parents=True)
        cgroup = {"linux": {"cgroupsPath": "/system.slice/webshop.service"}}
        (BUNDLE / "config.json").write_text(json.dumps(cgroup))

    def sh(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run a line of the shell in host a."""
        folder = tempfile.gettempdir()
        return self.lab.a.run(["sh", "-c", f"cd {folder}; {line}"], check=False, timeout=120)


@pytest.fixture(scope="module")
def host(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    script = tmp_path_factory.mktemp("bin") / "ipsecgate"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(program())} "$@"\n')
    script.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch, Host() as made:
        patch.setenv("IPSECGATE_CACHE_DIR", str(cache))  # the hooks are compiled
        patch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
        hosts = Path("/etc/hosts").read_text()
        gated = root() / "gated"
        gated.mkdir()
        try:
            made.prepare()
            made.start()
            made.knock("postgresql", 5, DB)  # the first call is refused, and the SA is negotiated
            made.wait(lambda: made.ask().get("sas"), "there is no SA")
            yield made
        finally:
            NEW.unlink(missing_ok=True)
            Path("/etc/hosts").write_text(hosts)
            cgroups.discard(gated)


@pytest.mark.parametrize("line", RUN)
def test_a_command_of_the_docs_does_what_it_says(host: Host, line: str) -> None:
    written = RUN[line]
    if written in ENDLESS:
        argv = [*host.lab.a.launcher(), *program(*arguments(line))]
        _, shown = record(argv, 80, ENVIRONMENT, 2)
        assert b"Traceback" not in shown
        assert b"next: " not in shown, "of an error"
        return
    (pid, *_) = (host.unit("postgresql") / "cgroup.procs").read_text().split()
    done = host.sh(line.replace("PID", pid))
    said = done.stdout + done.stderr
    assert done.returncode in CODES.get(written, (0,)), said
    assert "Traceback" not in said
    assert said or written.startswith(SILENT)


def test_only_the_commands_with_a_reason_are_left_out() -> None:
    assert set(OTHERWISE) <= set(WRITTEN), "the docs no longer have them"
    assert set(ENDLESS) <= set(RUN.values())
    run = {word for line in RUN for word in arguments(line)}
    only_named = {line for line in set(WRITTEN) - set(WHOLE) if arguments(line)[0] not in run}
    assert only_named <= set(OTHERWISE), "no page has the whole command"
    for reason in OTHERWISE.values():
        _, _, test = reason.rpartition(": ")
        assert not test.startswith("tests/") or (ROOT / test).is_file()
    assert len(RUN) > 30
