"""Real inspectors and real calls, with the test in the place of the controller's gate.

What an inspector answers by itself, and when it must ask.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ipsecgate.core.codec import seccomp as codec
from ipsecgate.core.model import events as on
from ipsecgate.edges.holding import call_file, seccomp
from ipsecgate.edges.holding.listeners import Listeners
from ipsecgate.lab.uml import children_of
from tests.processes import alive, descendants
from tests.system import caller
from tests.until import until

HERE, PORT = "127.0.0.1", 7400
MARK = (socket.SOL_SOCKET, seccomp.SO_MARK, 7)
TIMEOUT = 20.0  # seconds


class Program:
    """A `caller` whose calls are reported to `Listeners`."""

    def __init__(self, *, datagrams: bool = False) -> None:
        reader, writer = os.pipe()
        code = codec.program(seccomp.abi(), datagrams=datagrams)

        def install() -> None:
            listener = seccomp.install(code)
            os.set_inheritable(listener, True)
            os.write(writer, bytes([listener]))

        self.process = subprocess.Popen(
            [sys.executable, "-S", caller.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            close_fds=False,
            preexec_fn=install,  # noqa: PLW1509
        )
        (number,) = os.read(reader, 1)
        self.listener = seccomp.copy_descriptor(self.process.pid, number)
        os.close(reader)
        os.close(writer)

    def ask(self, call: str, address: str = HERE, port: int = PORT, **words: Any) -> None:
        """Have it make a call."""
        assert self.process.stdin
        words = {
            "call": call,
            "address": address,
            "port": port,
            "bind": None,
            "options": [],
        } | words
        self.process.stdin.write(json.dumps(words) + "\n")
        self.process.stdin.flush()

    async def result(self) -> str:
        """Return the errno of the call, "" for success."""
        assert self.process.stdout
        async with asyncio.timeout(TIMEOUT):
            return (await asyncio.to_thread(self.process.stdout.readline)).strip()

    async def call(self, call: str, address: str = HERE, port: int = PORT, **words: Any) -> str:
        """Make a call and return its result."""
        self.ask(call, address, port, **words)
        return await self.result()


class Bed:
    """Listeners whose calls are answered at once, unless `held`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.held = False
        self.made: list[on.CallMade] = []
        self.programs: list[Program] = []
        self.listeners = Listeners(self._deliver, folder)

    def _deliver(self, event: on.CallEvent) -> None:
        if isinstance(event, on.CallMade):
            self.made.append(event)
            if self.held:
                self.listeners.hold(event)
            else:
                self.listeners.answer(event.call, None)

    def start(self, *, datagrams: bool = False) -> Program:
        program = Program(datagrams=datagrams)
        self.programs.append(program)
        self.listeners.add(program.listener, 30.0)
        return program

    async def asked(self, program: Program, call: str, *words: Any, **more: Any) -> int:
        """Make a call and return how often we were asked about it."""
        before = len(self.made)
        await program.call(call, *words, **more)
        return len(self.made) - before

    def inspectors(self) -> list[int]:
        """Return the inspectors."""
        return sorted(alive(each for parent in self.parents() for each in children_of(parent)))

    def parents(self) -> list[int]:
        """Return the process that starts inspectors, if there is one."""
        running = descendants(os.getpid()).items()
        return [
            pid for pid, command in running
            if "inspector_main" in command and pid in children_of(os.getpid()) and alive([pid])
        ]  # fmt: skip

    async def close(self) -> None:
        for program in self.programs:
            program.process.kill()
            program.process.communicate()
        self.listeners.close()
        await until(lambda: not self.parents())


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    tmp_path.chmod(0o700)
    one = Bed(tmp_path)
    yield one
    await one.close()


CALLS = ["udp connect", "sendto", "tcp", "threaded tcp"]


@pytest.mark.parametrize("call", CALLS)
async def test_a_call_for_a_free_flow_is_answered_by_the_inspector(bed: Bed, call: str) -> None:
    """Also one of a later thread of its process, which Linux 6.1 cannot name by a pidfd."""
    program = bed.start()
    assert await bed.asked(program, call) == 1
    assert [await bed.asked(program, call) for _ in range(20)] == [0] * 20


@pytest.mark.parametrize("call", CALLS)
async def test_it_asks_again_once_the_epoch_has_ended(bed: Bed, call: str) -> None:
    program = bed.start()
    for _ in range(3):
        bed.listeners.end_epoch()
        assert await bed.asked(program, call) == 1
        assert await bed.asked(program, call) == 0
    bed.listeners.end_epoch()
    bed.held = True
    program.ask(call)
    await until(lambda: len(bed.made) == 4)
    await asyncio.sleep(0.1)
    assert program.process.poll() is None
    bed.listeners.answer(bed.made[-1].call, 113)
    assert await program.result() == "EHOSTUNREACH", "the inspector did not let it continue"


@pytest.mark.parametrize(
    ("call", "other"),
    [
        ("udp connect", {"address": "127.0.0.2"}),
        ("udp connect", {"address": "::1"}),
        ("udp connect", {"address": "::ffff:127.0.0.1"}),
        ("udp connect", {"port": PORT + 1}),
        ("udp connect", {"options": [MARK]}),
        ("udp connect", {"bind": "127.0.0.3"}),
        ("udp connect", {"bind": "127.0.0.1#7401"}),
        ("udp connect", {"call": "tcp"}),
        ("sendto", {"address": "127.0.0.2"}),
        ("sendto", {"options": [MARK]}),
        ("sendto", {"call": "udp connect"}),
    ],
)
async def test_it_asks_about_a_call_that_differs(
    bed: Bed, call: str, other: dict[str, Any]
) -> None:
    program = bed.start()
    await bed.asked(program, call)
    await bed.asked(program, call)
    assert await bed.asked(program, call) == 0
    assert await bed.asked(program, **{"call": call, **other}) == 1
    assert await bed.asked(program, call) == 0


async def test_it_asks_again_about_a_socket_that_was_bound_or_marked_meanwhile(bed: Bed) -> None:
    program = bed.start()
    assert await bed.asked(program, "kept udp connect") == 1
    # The first connect() gave the socket an address and a port, so it is another flow.
    assert await bed.asked(program, "kept udp connect") == 1
    assert await bed.asked(program, "kept udp connect") == 0
    assert await bed.asked(program, "kept udp connect", options=[MARK]) == 1
    assert await bed.asked(program, "kept udp connect", options=[MARK]) == 0


async def test_a_held_call_does_not_delay_other_programs(bed: Bed) -> None:
    program = bed.start()
    await bed.asked(program, "udp connect")
    other = bed.start()
    bed.held = True
    other.ask("udp connect")
    await until(lambda: len(bed.made) == 2)
    assert await bed.asked(program, "udp connect") == 0
    bed.listeners.answer(bed.made[-1].call, None)
    assert await other.result() == ""


async def test_a_message_without_an_address_is_answered_by_the_inspector(bed: Bed) -> None:
    program = bed.start(datagrams=True)
    before = len(bed.made)
    await program.call("connected 4")
    assert len(bed.made) == before + 1, "only connect() names an address"
    assert await bed.asked(program, "sendmsg") == 1
    assert await bed.asked(program, "sendmsg") == 0
    assert await bed.asked(program, "sendmsg", port=PORT + 1) == 1


@pytest.mark.parametrize("which", ["parent", "inspector"])
async def test_a_killed_inspector_is_replaced_and_its_calls_are_answered(
    bed: Bed, which: str
) -> None:
    program = bed.start()
    for _ in range(5):
        await bed.asked(program, "udp connect")
        (parent,), old = bed.parents(), bed.inspectors()
        os.kill(parent if which == "parent" else old[0], signal.SIGKILL)
        assert await program.call("udp connect") == "", "whoever answers it"
        await is_replaced(bed, old)
        assert await bed.asked(program, "udp connect") <= 1
        assert await bed.asked(program, "udp connect") == 0


async def is_replaced(bed: Bed, old: list[int]) -> None:
    await until(lambda: bed.inspectors() not in ([], old) and not alive(old))


async def test_calls_that_were_asked_about_wait_for_their_answer_if_the_inspector_dies(
    bed: Bed,
) -> None:
    program = bed.start()
    bed.held = True
    program.ask("udp connect")
    await until(lambda: bool(bed.made))
    old = bed.inspectors()
    os.kill(old[0], signal.SIGKILL)
    await is_replaced(bed, old)
    await asyncio.sleep(0.1)
    assert len(bed.made) == 1, "nobody asks again"
    bed.listeners.answer(bed.made[0].call, 113)
    assert await program.result() == "EHOSTUNREACH"


async def test_the_inspector_ends_with_its_listener(bed: Bed) -> None:
    program = bed.start()
    await bed.asked(program, "udp connect")
    old = bed.inspectors()
    assert len(old) == 1
    program.process.kill()
    program.process.wait()
    await until(lambda: not any(bed.folder.iterdir()))
    await until(lambda: not bed.inspectors())
    assert bed.parents()


async def test_calls_continue_when_no_slot_is_free(bed: Bed) -> None:
    program = bed.start()
    await bed.asked(program, "udp connect")
    old = bed.inspectors()
    os.kill(old[0], signal.SIGKILL)
    (path,) = bed.folder.iterdir()
    file = call_file.CallFile.create(path)
    for place in range(call_file.SLOT, call_file.SPARE, call_file.SLOT):
        file.set_asked(place, asked=True)  # its successor finds all of them taken
    await is_replaced(bed, old)
    bed.held = True
    assert await bed.asked(program, "udp connect", port=PORT + 1) == 0
    await asyncio.sleep(0.2)
    file.clear(call_file.SLOT)
    assert await bed.asked(program, "udp connect", port=PORT + 1) == 0, "it waits without a slot"
    program.ask("udp connect", port=PORT + 1)
    await until(lambda: len(bed.made) == 2)
    bed.listeners.answer(bed.made[-1].call, 113)
    assert await program.result() == "EHOSTUNREACH"
    file.close()
