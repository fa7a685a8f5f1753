"""`wait`, `up` and `down` as scripts and people see them; the controller is a fake one."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
import pytest
from rich.console import Console

from ipsecgate.admin import wait as client
from ipsecgate.admin.wait import Down, Target, Waited, Wish
from ipsecgate.cli import main
from ipsecgate.cli import wait as verbs
from ipsecgate.cli.wait_screen import screen
from ipsecgate.core.model.flow import TCP, Flow, parse_address
from ipsecgate.edges.host.control_server import Request, serving
from ipsecgate.errors import UsageError

FLOW = Flow(parse_address("10.2.0.9"), TCP, 80)


def target(state: str, cause: str = "", name: str = "db") -> Target:
    covered = state == "covered"
    return Target(
        target=name, kind="policy", state=state, flows=2, covered_flows=2 if covered else 1,  # type: ignore[typeddict-item]
        flow=None if covered else "tcp 10.2.0.9:80", network=None, child="net/net",
        negotiation="back-off", attempts=3, cause=cause, advice="" if covered else "do something",
    )  # fmt: skip


class Fake:
    """A controller that gives one answer after the other, and notes what it was asked."""

    def __init__(self, *answers: Sequence[Target] | Down) -> None:
        self.answers = list(answers)
        self.asked: list[Mapping[str, Any]] = []

    async def answer(self, request: Request) -> Mapping[str, Any]:
        self.asked.append(request.words)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, dict):
            return answer
        await asyncio.sleep(0 if len(answer) and answer[0]["state"] != "waiting" else 0.05)
        covered = all(one["state"] == "covered" for one in answer)
        return {"covered": covered, "targets": list(answer), "seen": str(len(self.asked))}


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    (tmp_path / "run").mkdir(parents=True)
    return ["--run-dir", str(tmp_path / "run")]


async def run(fake: Fake | None, paths: list[str], *words: str, after: float = 0.0) -> int:
    """Run the command line beside the fake, which starts after so many seconds."""

    def call() -> int:
        with pytest.raises(SystemExit) as ended:
            main([*paths, *words])
        assert isinstance(ended.value.code, int)
        return ended.value.code

    if fake is None:
        return await asyncio.to_thread(call)
    early = asyncio.create_task(asyncio.to_thread(call)) if after else None
    await asyncio.sleep(after)
    control = Path(paths[1]) / "control.sock"
    async with serving(control, {}, {"wait": fake.answer, "down": fake.answer}):
        return await (early or asyncio.to_thread(call))


async def test_success_is_silent_in_a_script(
    paths: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    fake = Fake([target("waiting", "not yet")], [target("covered")])
    assert await run(fake, paths, "wait", "--policy", "db", "--to", "10.2.0.9:80") == 0
    assert capfd.readouterr() == ("", "")
    words = fake.asked[0]
    assert words["flows"] == [["10.2.0.9:80", "10.2.0.9", TCP, 80]]
    assert (words["policies"], words["every"], words["negotiate"]) == (["db"], False, True)
    assert words["seen"] is None, "only the end is of interest"


async def test_a_timeout_tells_the_cause(
    paths: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    fake = Fake([target("waiting", "AUTHENTICATION_FAILED"), target("covered", name="web")])
    assert await run(fake, paths, "wait", "--all", "--timeout", "200ms") == 124
    out, err = capfd.readouterr()
    assert out == ""
    assert re.match(r"ipsecgate: 1 of 2 targets: not covered after \d\.\d s\n", err)
    assert "  db: AUTHENTICATION_FAILED" in err
    assert "do something" in err
    fake = Fake([target("waiting", "AUTHENTICATION_FAILED")])
    assert await run(fake, paths, "wait", "--policy", "db", "--timeout", "0") == 124
    assert len(fake.asked) == 1, "0: only look"
    said = capfd.readouterr().err
    assert re.match(r"ipsecgate: db: not covered after \d\.\d s: AUTHENTICATION_FAILED\n", said)


async def test_each_failure_has_its_network_and_its_next_step(
    paths: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    site: Any = {**target("waiting", "child net/net: back-off"), "network": "10.2.0.0/16"}
    other: Any = {**target("waiting", "no child", "web"), "advice": "load it"}
    assert await run(Fake([site, other]), paths, "wait", "--all", "--timeout", "0") == 124
    lines = [line.strip() for line in capfd.readouterr().err.splitlines()]
    assert lines[1:] == [
        "db (10.2.0.0/16, child net/net): back-off", "next: do something", "web: no child",
        "next: load it",
    ]  # fmt: skip


async def test_what_can_never_be_covered_ends_at_once(
    paths: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    fake = Fake([target("never", "no policy is named db")])
    assert await run(fake, paths, "wait", "--policy", "db", "--timeout", "infinity") == 1
    assert "db: cannot be covered: no policy is named db" in capfd.readouterr().err


@pytest.mark.parametrize(("state", "code"), [("covered", 0), ("waiting", 124), ("never", 1)])
async def test_json_is_one_document(
    paths: list[str], capfd: pytest.CaptureFixture[str], state: str, code: int
) -> None:
    for words in (["wait", "--all"], ["up", "db"]):
        fake = Fake([target(state, "x")])
        assert await run(fake, paths, "--json", *words, "--timeout", "100ms") == code
        out, err = capfd.readouterr()
        document = json.loads(out)
        assert (document["covered"], document["timed_out"]) == (code == 0, code == 124)
        assert document["targets"] == [target(state, "x")]
        assert err == ""


async def test_a_controller_that_starts_later_counts(
    paths: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "RETRY", 0.02)
    fake = Fake([target("covered")])
    assert await run(fake, paths, "wait", "--all", after=0.3) == 0
    assert await run(None, paths, "wait", "--all", "--timeout", "200ms") == 3
    assert "no controller answers" in capfd.readouterr().err


async def test_the_service_manager_hears_what_is_missing(
    paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setattr(client, "RETRY", 0.02)
        missing = [target("waiting", "no proposal"), target("covered", name="web")]
        fake = Fake(missing, [target("covered")])
        assert await run(fake, paths, "wait", "--all", after=0.2) == 0
        assert manager.recv(4096) == b"STATUS=waiting for the controller"
        heard = b""
        while b"covered" not in heard:
            heard = manager.recv(4096)
        assert heard == b"STATUS=1 of 2 covered; db: no proposal"
        assert fake.asked[0]["seen"] == "", "each change is of interest"


async def test_a_name_that_does_not_resolve_is_tried_again(
    paths: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[str] = []

    def lookup(host: str, *_more: Any, **_options: Any) -> list[Any]:
        tries.append(host)
        if host == "nowhere.example" or len(tries) < 2:
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return [(0, 0, 0, "", (address, 0)) for address in ("10.2.0.9", "2001:db8::9")]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    monkeypatch.setattr(verbs, "RESOLVE_AGAIN", 0.05)
    fake = Fake([target("covered")])
    assert await run(fake, paths, "wait", "--to", "db.example:80/udp") == 0
    assert [flow[1] for flow in fake.asked[0]["flows"]] == ["10.2.0.9", "2001:db8::9"]
    code = await run(fake, paths, "wait", "--to", "nowhere.example:80", "--timeout", "200ms")
    assert code == 124
    assert "nowhere.example cannot be resolved" in capfd.readouterr().err


async def test_wrong_arguments_are_named(
    paths: list[str], capfd: pytest.CaptureFixture[str]
) -> None:
    for words, said in (
        (["wait"], "wait for what?"),
        (["wait", "--to", "10.2.0.9"], "is not HOST:PORT"),
        (["wait", "--all", "--timeout", "soon"], "is not a time"),
        (["down", "db", "--timeout", "infinity"], "is not a time"),
        (["up"], "Missing argument 'NAME'"),
    ):
        assert await run(None, paths, *words) == 2
        assert said in capfd.readouterr().err


def test_too_many_targets_for_one_request() -> None:
    wish = Wish({f"host{at}:80": [FLOW] for at in range(200)})
    with pytest.raises(UsageError, match="too many targets"):
        wish.words()


def test_times() -> None:
    assert verbs.limit("infinity") == float("inf")
    assert verbs.limit("500ms") == 0.5
    with pytest.raises(click.BadParameter):
        verbs.limit("inf")


# --- down ---------------------------------------------------------------------------------------


def ended(*states: bool, starts: Sequence[str] = ()) -> Down:
    sas = [{"child": "net/net", "spi": "c0ffee01", "peer": "192.0.2.2", "ended": s} for s in states]
    return Down(sas=sas, policies=["db", "web"], starts=list(starts))  # type: ignore[typeddict-item]


async def test_down_says_what_follows(paths: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert await run(Fake(ended(True, starts=["web"])), paths, "down", "db") == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "ended: net/net, c0ffee01 to 192.0.2.2" in out
    assert "db, web protects are refused until an SA is up again" in out
    assert "policy web has initiate" in out
    assert await run(Fake(ended()), paths, "down", "db") == 0
    assert capfd.readouterr().out == "nothing is up for db\n"
    for words, code in (([], 124), (["--json"], 124)):
        assert await run(Fake(ended(True, False)), paths, *words, "down", "db") == code
    out, err = capfd.readouterr()
    assert "192.0.2.2 did not confirm the end within 30 s" in err
    assert json.loads(out[out.index("{") :])["sas"][1]["ended"] is False


# --- the screen ---------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 140])
def test_the_progress_on_a_terminal(width: int) -> None:
    def drawn(found: Waited | None, timeout: float = 60.0) -> list[str]:
        console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115
        console.print(screen(found, 3.2, timeout))
        return console.export_text().splitlines()

    assert drawn(None)[0].strip() == "Waiting for the controller, 3 of 60 s"
    cause = "child net/net: back-off, 3 attempts; last error: received AUTHENTICATION_FAILED"
    targets = [target("covered"), *(target("waiting", cause, f"db{at}") for at in range(12))]
    found = Waited(covered=False, timed_out=False, seconds=3.2, targets=targets)
    lines = drawn(found, float("inf"))
    assert lines[0].strip() == "Waiting for live SAs: 1 of 13 covered, 3 s"
    assert lines[-1].strip() == "and 2 more"
    assert all(len(line) <= width for line in lines)
    assert "back-off" in lines[1]
    assert "AUTHENTICATION_FAILED" in " ".join(" ".join(lines).split())
