"""The model and the screen of `top`."""

from __future__ import annotations

import io
import os
import pty
import sys
import time
from contextlib import suppress
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from ipsecgate.admin.top_document import Top
from ipsecgate.cli.top_screen import KEYS, View, screen
from ipsecgate.monitor.top import Sample, rate, top
from tests.typed_document import mismatches
from tests.unit.status_documents import GATED, policy, refused, status

CGROUPS = {GATED: "/sys/fs/cgroup/system.slice/web.service/worker", 43: "/sys/fs/cgroup/a/b"}


def sample(at: float, **changed: Any) -> Sample:
    return Sample(at, status(**changed), CGROUPS, {70: 43})


def counts(**more: int) -> dict[str, Any]:
    before = status()["counters"]
    return {**before, **{name: before[name] + count for name, count in more.items()}}  # type: ignore[literal-required]


@pytest.mark.parametrize(
    ("before", "now", "seconds", "expected"),
    [
        (10, 30, 2.0, 10.0),
        (10, 10, 2.0, 0.0),
        (None, 8, 2.0, 4.0),  # it is new
        (100, 6, 2.0, 3.0),  # the controller began anew
        (10, 30, None, None),  # there is only one sample
    ],
)
def test_a_rate(before: int | None, now: int, seconds: float | None, expected: float) -> None:
    assert rate(before, now, seconds) == expected


def test_rates_by_policy_and_cgroup() -> None:
    more = [refused("db", GATED, 25), refused(None, 43, 7, 5)]
    now = sample(
        14.0,
        counters=counts(allowed=8, refused=40),
        refused_by_policy=more,
        refused_by_cgroup=more,
    )
    document = top(sample(10.0), now)
    assert mismatches(document, Top) == []
    assert document["seconds"] == 4.0
    assert (document["rates"]["allowed"], document["rates"]["refused"]) == (2.0, 10.0)
    policies = {row["policy"]: row for row in document["policies"]}
    assert policies["db"]["refused_per_second"] == 5.0
    assert policies["db"]["coverage"] == "covered"
    assert policies["web"]["refused"] == 0
    assert policies["web"]["held"] == 1
    assert policies["web"]["last_error"] == "no proposal chosen"
    assert policies[None]["blocked_per_second"] == 1.0
    assert policies["lan"]["action"] == "bypass"
    cgroups = {row["cgroup_id"]: row for row in document["cgroups"]}
    assert cgroups[GATED]["unit"] == "web.service"
    assert cgroups[GATED]["refused_per_second"] == 5.0
    assert (cgroups[GATED]["policy"], cgroups[GATED]["coverage"]) == ("db", "covered")
    assert (cgroups[43]["unit"], cgroups[43]["held"], cgroups[43]["blocked"]) == ("", 1, 5)


def test_without_a_controller_counts_are_unknown_and_not_zero() -> None:
    dead = {"controller": {"alive": False, "pid": None, "since": None}, "holds": []}
    none = {**dead, "refused_by_policy": [], "refused_by_cgroup": []}
    document = top(sample(10.0), sample(12.0, **none, counters=counts(refused=4)))
    assert document["rates"]["refused"] == 2.0, "the hooks count it"
    assert not document["controller"]
    assert document["sas"] is None
    for row in (*document["policies"], *document["cgroups"]):
        assert row["refused"] is row["refused_per_second"] is None


# --- the screen ---------------------------------------------------------------------------------


def drawn(
    document: Top | None, view: View, width: int, height: int | None, problem: str = ""
) -> str:
    out = io.StringIO()
    Console(file=out, width=width, highlight=False, markup=False, emoji=False).print(
        screen(document, problem, view, width, height)
    )
    return out.getvalue()


def many(count: int) -> Top:
    names = [f"policy-with-a-long-name-{n}" for n in range(count)]
    rows = [refused(name, n, n * 1000) for n, name in enumerate(names)]
    now = sample(
        2.0,
        policies=[policy(name, "uncovered") for name in names],
        refused_by_policy=rows,
        refused_by_cgroup=rows,
        negotiations=[],
        holds=[],
        hooks=[],
        errors=[
            {"text": f"error {n} that is much longer than any terminal {'x' * 200}", "advice": ""}
            for n in (1, 2, 3)
        ],
    )
    return top(sample(1.0), now)


@pytest.mark.parametrize("by", ["policy", "cgroup"])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (140, 40), (80, 10), (60, 12)])
@pytest.mark.parametrize("count", [1, 15, 16, 17, 500])
def test_a_screen_fits_its_terminal(by: Any, width: int, height: int, count: int) -> None:
    lines = drawn(many(count), View(by=by), width, height).splitlines()
    assert len(lines) <= height
    assert max(map(len, lines)) <= width
    assert lines[-1].startswith("q quit"[: width - 1]), "the keys are at the bottom"
    shown = sum("policy-with" in line or "removed" in line for line in lines)
    assert shown
    if shown < count:
        assert any(line.startswith("and ") for line in lines)


def test_the_keys_change_the_view() -> None:
    view = View()
    assert view.pressed("c").by == "cgroup"
    assert view.pressed("c").pressed("p").by == "policy"
    assert [view.sort, view.pressed("s").sort, view.pressed("s").pressed("s").sort] == [
        "refused/s", "refused", "held",
    ]  # fmt: skip
    assert view.pressed("s").pressed("s").pressed("s").pressed("s") == view
    assert view.pressed(" ").paused
    assert view.pressed(" ").pressed(" ") == view
    assert view.pressed("h").help
    assert view.pressed("h").pressed("x") == view, "any key leaves the help"
    assert view.pressed("x") == view


def test_the_order_is_the_one_that_was_chosen() -> None:
    document = many(4)
    text = drawn(document, View(sort="refused"), 100, None)
    places = [text.index(f"name-{n}") for n in range(4)]
    assert places == sorted(places, reverse=True)
    text = drawn(document, View(sort="name"), 100, None)
    places = [text.index(f"name-{n}") for n in range(4)]
    assert places == sorted(places)


def test_rows_keep_their_places_while_their_rates_vary() -> None:
    document = many(3)
    orders = set()
    for rates in ((0.9, 1.1, 0.0), (1.1, 0.9, 2.0), (0.0, 2.0, 1.0)):
        for row, rate_now in zip(document["policies"], rates, strict=True):
            row["refused_per_second"], row["blocked_per_second"] = rate_now, 0.0
            row["last"] = time.time()
        text = drawn(document, View(), 100, None)
        orders.add(tuple(sorted(range(3), key=lambda n: text.index(f"name-{n}"))))
    assert orders == {(2, 1, 0)}, "by what was refused in all"
    document["policies"][0]["refused_per_second"] = 200.0
    text = drawn(document, View(), 100, None)
    assert text.index("name-0") < text.index("name-2")


def test_what_is_wrong_is_said() -> None:
    assert "not loaded" in drawn(None, View(), 80, 24, "the hooks are not loaded")
    document = many(1)
    document["controller"] = False
    assert "controller not running" in drawn(document, View(), 80, 24)
    assert "no answer; this is older" in drawn(document, View(), 80, 24, "no answer")
    assert "paused" in drawn(document, replace(View(), paused=True), 80, 24)
    helped = drawn(document, replace(View(), help=True), 80, 24)
    assert all(meaning in helped for _, meaning in KEYS)
    assert "nothing is gated" in drawn({**document, "cgroups": []}, View(by="cgroup"), 80, 24)


# --- the terminal -------------------------------------------------------------------------------

RUN = """
import os, signal, sys, termios, threading
from ipsecgate.cli.terminal import keys
before = termios.tcgetattr(0)
try:
    with keys() as found:
        assert termios.tcgetattr(0) != before
        print("reading", flush=True)
        {body}
except BaseException as error:
    print("ended by", type(error).__name__)
assert termios.tcgetattr(0) == before
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
print("restored")
"""


@pytest.mark.parametrize(
    ("body", "ending"),
    [
        ("raise RuntimeError", "ended by RuntimeError"),
        ("os.kill(os.getpid(), signal.SIGTERM)", "ended by SystemExit"),
        ("os.kill(os.getpid(), signal.SIGHUP)", "ended by SystemExit"),
        ("os.kill(os.getpid(), signal.SIGINT)", "ended by KeyboardInterrupt"),
        ("os.kill(os.getpid(), signal.SIGTSTP)", ""),
        ("threading.Timer(0.2, found.wake).start(); assert found.wait(60) == ''", ""),
        ("os.kill(os.getpid(), signal.SIGWINCH); assert found.wait(60) == ''", ""),
        ("assert found.wait(60) == 'x'", ""),
    ],
)
def test_a_terminal_is_left_as_it_was_found(body: str, ending: str) -> None:
    pid, master = pty.fork()
    if not pid:
        os.execv(sys.executable, [sys.executable, "-c", RUN.format(body=body)])
    output = b""
    while b"reading" not in output:
        output += os.read(master, 4096)
    os.write(master, b"x" if "'x'" in body else b"")
    with suppress(OSError):  # the other end is closed
        while some := os.read(master, 4096):
            output += some
    os.close(master)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, output
    assert ending in output.decode()
    assert bool(ending) is (b"ended by" in output), output
    assert b"restored" in output
