"""Completion in real shells: what Tab makes of a line, typed into an interactive one."""

from __future__ import annotations

import asyncio
import os
import pty
import select
import shlex
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator, Mapping
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import click
import pytest

from ipsecgate.cli import complete
from ipsecgate.cli.app import cli
from ipsecgate.cli.manual import commands
from ipsecgate.cli.shells import SHELLS, script
from ipsecgate.core.model.flow import TrafficSelector
from ipsecgate.core.model.ipsec import ChildConfig, ChildName, Mode
from ipsecgate.edges.host import cgroups, control_server, runtimes, saved_state
from ipsecgate.edges.host.control_server import Request
from ipsecgate.edges.host.runtimes import Container

LIMIT = 20.0  # seconds for a shell to answer
START = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "source {script}"),
    "zsh": (
        ["zsh", "-f", "-i"],
        "unsetopt BEEP; autoload -U compinit; compinit -D -u; source {script}",
    ),
    "fish": (["fish", "--no-config", "-i"], "source {script}"),
}
EVENTS = [
    {"kind": "log", "seq": 1},
    {"kind": "refused", "daddr": "10.2.0.5", "proto": 6, "dport": 5432, "comm": "psql"},
    {"kind": "blocked", "daddr": "2001:db8:2::5", "proto": 17, "dport": 53, "comm": "d\x1b[2Jig"},
]
STATUS = {
    "children": ["west/net-net", "west/db"],
    "policies": [
        {"name": "db", "action": "protect", "remote": ["10.2.0.0/16"]},
        {"name": "printer", "action": "bypass", "remote": ["10.2.9.9/32"]},
    ],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `ipsecgate`, which writes its arguments to `arguments` unless it completes."""
    folder = tmp_path_factory.mktemp("completion")
    program = folder / "ipsecgate"
    program.write_text(
        "#!/bin/sh\n"
        f'[ -z "$_IPSECGATE_COMPLETE" ] || exec {sys.executable} -m ipsecgate\n'
        f'printf "%s\\n" "$@" >{folder}/new; mv {folder}/new {folder}/arguments\n'
    )
    program.chmod(0o755)
    for shell in SHELLS:
        (folder / shell).write_text(script(shell, cli))
    (folder / "bpf/ipsecgate/blue-team").mkdir(parents=True)
    (folder / "run").mkdir(mode=0o700)
    (folder / "with space").mkdir()
    return folder


@pytest.fixture(scope="module")
def controller(place: Path) -> Iterator[None]:
    """A control socket that answers as a controller does."""
    ready, end = threading.Event(), asyncio.Event()

    async def status(_: Request) -> Mapping[str, Any]:
        return STATUS

    async def events(_: Request) -> Mapping[str, Any]:
        return {"events": EVENTS}

    async def serve() -> None:
        verbs = {"status": status, "events": events}
        async with control_server.serving(place / "run/control.sock", verbs):
            ready.set()
            await end.wait()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(LIMIT)
    yield
    loop.call_soon_threadsafe(end.set)
    thread.join()
    loop.close()


def environment(place: Path) -> dict[str, str]:
    return {
        "PATH": f"{place}:/usr/bin:/bin:/usr/sbin:/sbin",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "HOME": str(place), "TERM": "xterm", "LC_ALL": "C.UTF-8", "IPSECGATE_BPFFS": f"{place}/bpf",
        "IPSECGATE_RUN_DIR": f"{place}/run", "IPSECGATE_CACHE_DIR": f"{place}/cache",
        "IPSECGATE_CONFIG": f"{place}/none.toml", "XDG_RUNTIME_DIR": str(place),  # of fish
    }  # fmt: skip


def typed(shell: str, place: Path, keys: str) -> list[str]:
    """Type keys and Enter into an interactive shell; return the arguments that `ipsecgate` gets."""
    answer, marker = place / "arguments", place / "ready"
    answer.unlink(missing_ok=True)
    marker.unlink(missing_ok=True)
    argv, setup = START[shell]
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(place)
        os.execvpe(argv[0], argv, environment(place))
    termios.tcsetwinsize(terminal, (40, 120))
    seen = b""
    try:
        line = setup.format(script=place / shell)
        os.write(terminal, f"{line}; touch {marker}\n".encode())
        deadline, sent = time.monotonic() + LIMIT, False
        while not answer.exists():
            if not sent and marker.exists():
                os.write(terminal, f"{keys}\n".encode())
                sent = True
            if select.select([terminal], [], [], 0.02)[0]:
                seen += os.read(terminal, 1 << 16)
            assert time.monotonic() < deadline, seen.decode(errors="replace")
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)
    return answer.read_text().splitlines()


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("keys", "arguments"),
    [
        ("ipsecgate rel\t", ["reload"]),
        ("ipsecgate -i bl\tstatus", ["-i", "blue-team", "status"]),
        ("ipsecgate --instance=bl\tstatus", ["--instance=blue-team", "status"]),
        ("ipsecgate why 10.2.0.5:5\t", ["why", "10.2.0.5:5432"]),
        ("ipsecgate why 10\t--from=10.1.0.1", ["why", "10.2.0.5:5432", "--from=10.1.0.1"]),
        ("ipsecgate exec --us\tnobo\t-- whoam\t", ["exec", "--user", "nobody", "--", "whoami"]),
        ("ipsecgate attach /usr/share/zone\t", ["attach", "/usr/share/zoneinfo"]),
        (
            "ipsecgate why --cgroup=/usr/share/zone\t x",
            ["why", "--cgroup=/usr/share/zoneinfo", "x"],
        ),
        ("LANG=C ipsecgate rel\t", ["reload"]),
        ("true && ipsecgate rel\t", ["reload"]),
    ],
    ids=[
        "verb",
        "option",
        "option=",
        "after a colon",
        "unique flow",
        "command",
        "folder",
        "=folder",
        "after a variable",
        "second command",
    ],
)
def test_tab_completes_a_word(
    shell: str, keys: str, arguments: list[str], place: Path, controller: None
) -> None:
    found = [word.rstrip("/") for word in typed(shell, place, keys)]  # zsh removes it at the end
    assert found == arguments


@pytest.mark.parametrize("shell", SHELLS)
def test_a_value_that_the_shell_would_interpret_is_quoted(
    shell: str, place: Path, controller: None
) -> None:
    """An IPv6 address is in brackets, which are a pattern for a shell."""
    assert typed(shell, place, "ipsecgate why \\[\t")[1] == "[2001:db8:2::5]:53/udp"


def offered(place: Path, line: str) -> dict[str, str]:
    """Return the values that fish offers at the end of a line, and their descriptions."""
    asked = shlex.quote(line)
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source {place}/fish; complete -C {asked}"],
        capture_output=True, text=True, check=True, env=environment(place),
    )  # fmt: skip
    assert not done.stderr
    found = (shown.partition("\t") for shown in done.stdout.splitlines())
    return {value: about for value, _, about in found}


def test_fish_shows_what_a_value_is(place: Path, controller: None) -> None:
    assert offered(place, "ipsecgate why ") == {
        "[2001:db8:2::5]:53/udp": r"blocked: d\x1b[2Jig",
        "10.2.0.5:5432": "refused: psql",
    }
    assert offered(place, "ipsecgate unl") == {
        "unload": "Remove the hooks and their maps, which opens the gate."
    }


def test_a_pid_has_the_name_of_its_process(place: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            assert offered(place, f"ipsecgate why --pid {process.pid}") == {
                str(process.pid): "sleep"
            }
        finally:
            process.kill()


def values(completer: complete.Completer, typed: str = "") -> dict[str, str | None]:
    """Return what a completer offers."""
    context = cli.make_context("ipsecgate", ["status"], resilient_parsing=True)
    return {item.value: item.help for item in completer(context, click.Argument(["value"]), typed)}


def test_policies_and_children_come_from_the_controller(
    place: Path, controller: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(place).items():
        monkeypatch.setenv(name, value)
    assert values(complete.policies) == {
        "db": "protect 10.2.0.0/16", "printer": "bypass 10.2.9.9/32",
    }  # fmt: skip
    assert values(complete.policies, "pr").keys() == {"printer"}
    assert values(complete.children).keys() == {"west/net-net", "west/db"}
    assert values(complete.needs, "d").keys() == {"db"}
    assert values(complete.needs, "w").keys() == {"west/net-net", "west/db"}


def test_without_a_controller_they_come_from_configuration_and_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("IPSECGATE_CONFIG", str(tmp_path / "c.toml"))
    assert values(complete.policies) == values(complete.children) == {}
    child = ChildConfig(
        ChildName("west", "net"), Mode.TUNNEL, (), (TrafficSelector(ip_network("10.3.0.0/16")),)
    )
    saved_state.save_children(tmp_path / "cache/default.children.json", (child,))
    (tmp_path / "c.toml").write_text(
        '[[policy]]\nname = "printer"\nremote = ["10.2.9.9/32"]\naction = "bypass"\n'
    )
    assert values(complete.policies) == {
        "printer": "bypass 10.2.9.9/32", "west/net": "protect 10.3.0.0/16",
    }  # fmt: skip
    assert values(complete.children) == {"west/net": "10.3.0.0/16"}
    (tmp_path / "c.toml").write_text("[gait]")
    assert values(complete.policies) == {}, "an invalid configuration is silent"


@pytest.mark.parametrize(
    ("path", "targets"),
    [
        ("system.slice/web.service", {"unit:web"}),
        ("system.slice/a.b.service", {"unit:a.b.service"}),
        ("gated.slice", {"unit:gated.slice"}),
        ("user.slice/user@1.service/app.slice/web.service", set()),
        ("machine.slice/libpod-" + 64 * "a" + ".scope", {"container:shop"}),
        ("docker/" + 64 * "b", {"container:bbbbbbbbbbbb"}),
        ("docker/" + 64 * "b" + "/system.slice/web.service", set()),
        ("plain", set()),
    ],
)  # fmt: skip
def test_the_targets_of_a_cgroup_name_it(
    path: str, targets: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    top = cgroups.root()
    known = [
        Container(64 * "a", f"machine.slice/libpod-{64 * 'a'}.scope", frozenset({"shop"})),
        Container(64 * "b", f"docker/{64 * 'b'}"),
    ]
    found = set(cgroups.targets_of(top / path, {top / one.cgroup: one for one in known}))
    assert found == targets
    monkeypatch.setattr(runtimes, "containers", lambda *_, **__: known)
    assert {target for target, _ in cgroups.naming(top / path, sorted(found))} == targets


# Parameters that take a live value, whatever the verb; and those of one verb.
LIVE = {
    "target",
    "to",
    "pid",
    "cgroup",
    "container",
    "unit",
    "policy",
    "policies",
    "instance",
    "user",
}
LIVE_OF = {("up", "name"), ("down", "name"), ("unit-dropin", "name")}


def test_every_parameter_with_a_live_value_completes_it() -> None:
    for verb, command in [("ipsecgate", cli), *commands()]:
        for parameter in command.params:
            if parameter.name in LIVE or (verb, parameter.name) in LIVE_OF:
                assert parameter._custom_shell_complete is not None, f"{verb} {parameter.name}"


@pytest.mark.parametrize(
    "words", ["", "why --pid ", "why --cgroup ", "why ", "attach ", "detach ", "exec --cgroup "]
)
def test_when_nothing_runs_a_completion_is_silent_and_imports_little(
    words: str, tmp_path: Path
) -> None:
    """What is slow: rich and asyncio take 40 ms each."""
    variables = {
        **environment(tmp_path), "_IPSECGATE_COMPLETE": "bash_complete",
        "COMP_LINE": f"ipsecgate {words}", "COMP_BREAKS": ":=",
    }  # fmt: skip
    code = (
        "import atexit, sys; from ipsecgate.cli import main\n"
        "atexit.register(lambda: print('|', *sys.modules)); main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, env=variables, text=True
    )
    assert not done.stderr
    assert "Traceback" not in done.stdout
    modules = {name.split(".")[0] for name in done.stdout.partition("| ")[2].split()}
    assert "click" in modules
    assert not modules & {"rich", "asyncio", "bcc", "vici", "pyroute2"}
