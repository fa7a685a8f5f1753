"""Put a world into the kernel, make every call gated and free, and compare.

    the gate        the kernel (the same call outside the cgroup)
    live            covered: right
                    clear: right if policies are derived and an exception wins, else WRONG
                    refused: "let go, and dropped" if the model names a reason, else WRONG
    refused         covered, or clear by an exception that counts: "stricter" if the model
                    names a reason, else WRONG; clear otherwise, or refused: right

A gated call that was let through must itself have left like that.
"""

from __future__ import annotations

import collections
import errno
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ipsecgate.core.tables.layout import LayoutError, TableId
from ipsecgate.core.tables.table import Table
from tests.system.oracle.caller import Caller
from tests.system.oracle.capture import HarnessError, Sent, answer
from tests.system.oracle.limits import drops, reasons
from tests.system.oracle.model import CLEAR, COVERED, REFUSED, Model
from tests.system.oracle.two_namespaces import REFUSAL, TwoNamespaces
from tests.system.oracle.world import Call, World

REFUSED_BY_GATE = errno.errorcode[REFUSAL]
WENT_OUT = ("", "EINPROGRESS")
ANSWERS = {Sent.COVERED: COVERED, Sent.CLEAR: CLEAR, Sent.NOTHING: REFUSED}
MANY = 100


@dataclass(frozen=True, slots=True)
class Verdict:
    """The outcome of one call: `gate` is live or refused, `kernel` covered, clear or refused."""

    call: Call
    gate: str
    kernel: str
    details: str
    masks: int  # in the gate's table
    way: str  # the kind of origin and device
    reason: str = ""
    wrong: str = ""
    dropped: str = ""


class WrongAnswerError(AssertionError):
    """The gate and the kernel disagree; the text has the smallest case that shows it."""


@dataclass
class Tally:
    """The counts so far."""

    worlds: int = 0
    full: int = 0
    refused_things: collections.Counter[str] = field(default_factory=collections.Counter)
    things: int = 0
    masks: list[int] = field(default_factory=list)  # in the gate's table, of each world
    among_many: int = 0  # calls in a world with more than MANY masks
    answers: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    stricter: collections.Counter[str] = field(default_factory=collections.Counter)
    dropped: collections.Counter[str] = field(default_factory=collections.Counter)
    ways: collections.Counter[str] = field(default_factory=collections.Counter)

    @property
    def cases(self) -> int:
        return sum(self.answers.values())

    def add(self, verdict: Verdict) -> None:
        self.answers[verdict.gate, verdict.kernel] += 1
        self.among_many += verdict.masks > MANY
        if verdict.reason:
            self.stricter[verdict.reason] += 1
        if verdict.dropped:
            self.dropped[verdict.dropped] += 1
        self.ways[f"{verdict.way}: {verdict.gate}, {verdict.kernel}"] += 1

    def __str__(self) -> str:
        kernel: collections.Counter[str] = collections.Counter()
        for (_gate, outcome), count in self.answers.items():
            kernel[outcome] += count
        live = sum(count for (gate, _), count in self.answers.items() if gate == "live")
        rows = {
            "cases": self.cases,
            "worlds (SPD and SAD)": self.worlds,
            "policies and states": self.things,
            "masks of a world, median": round(statistics.median(self.masks or [0])),
            "masks of a world, maximum": max(self.masks, default=0),
            f"cases among more than {MANY} masks": self.among_many,
            **{f"    not taken: {why}": n for why, n in self.refused_things.most_common()},
            "the kernel: covered": kernel[COVERED],
            "the kernel: clear": kernel[CLEAR],
            "the kernel: refused": kernel[REFUSED],
            "the gate: live": live,
            "the gate: refused": self.cases - live,
            "stricter": sum(self.stricter.values()),
            **{f"    {why}": n for why, n in self.stricter.most_common()},
            "let go, and dropped by the kernel": sum(self.dropped.values()),
            **{f"    {why}": n for why, n in self.dropped.most_common()},
            **{f"    by {way}": n for way, n in sorted(self.ways.items())},
            "worlds too big for the hooks": self.full,
            "wrong": 0,
        }
        return "\n".join(f"{name:44}{count:>10}" for name, count in rows.items())


class Judge:
    """Compares the gate with the kernel; `shrinks` a mismatch before reporting it."""

    def __init__(self, namespaces: TwoNamespaces, shrinks: bool = True) -> None:
        self.namespaces = namespaces
        self.shrinks = shrinks
        self.tally = Tally()

    async def judge(self, world: World) -> None:
        """Compare and count every call of a world. Raises: WrongAnswerError, HarnessError."""
        await self.namespaces.begin(world)
        world, refused = self.install(world)
        self.tally.refused_things.update(refused)
        self.tally.worlds += 1
        self.tally.things += len(world.policies) + len(world.states)
        try:
            verdicts = await self.verdicts(world)
        except LayoutError:
            self.tally.full += 1
            return
        except HarnessError as error:
            raise HarnessError(f"{error}\n{world}\nrepeat: ORACLE_SEED={world.seed}") from error
        self.tally.masks.append(verdicts[0].masks)
        for verdict in verdicts:
            if verdict.wrong:
                raise WrongAnswerError(await self.explain(world, verdict))
            self.tally.add(verdict)

    def install(self, world: World) -> tuple[World, list[str]]:
        """Install a world; return the part that the kernel accepted, and the errnos of the rest."""
        codes = self.namespaces.installer.install(world)
        count = len(world.policies)
        policies = [p for p, code in zip(world.policies, codes, strict=False) if not code]
        states = [s for s, code in zip(world.states, codes[count:], strict=True) if not code]
        refused = [errno.errorcode.get(code, str(code)) for code in codes if code]
        return replace(world, policies=tuple(policies), states=tuple(states)), refused

    async def verdicts(self, world: World) -> list[Verdict]:
        """Answer every call of an installed world. Raises: LayoutError, HarnessError."""
        namespaces = self.namespaces
        namespaces.set_port(world.port)
        table = await namespaces.table()
        await namespaces.data.publish(TableId.SPD, table)
        before = namespaces.counted()
        gated = self.made(namespaces.gated, namespaces.container.gated, world)
        allowed, stopped = (
            now - then for now, then in zip(namespaces.counted(), before, strict=True)
        )
        free = self.made(namespaces.free, namespaces.container.free, world)
        model = Model(world, namespaces)
        found = []
        for call, (gated_error, sent_gated, _), (error, sent, moved) in zip(
            world.calls, gated, free, strict=True
        ):
            gate = "refused" if gated_error == REFUSED_BY_GATE else "live"
            silent = call.inside or model.is_tunneled(call)
            kernel = kernel_answer(call, error, sent, moved, silent)
            details = f"{gated_error or 0}/{error or 0} {' '.join(moved)}"
            verdict = Verdict(call, gate, kernel, details, len(table.rows), model.describe(call))
            found.append(check(verdict, model, sent_gated))
        live = sum(error in WENT_OUT for error, _, _ in gated)
        # send() on an IPv6 socket connected to a v4-mapped address is checked once more. Some calls
        # fail before the hooks see them.
        if stopped != sum(v.gate == "refused" for v in found) or allowed < live:
            lines = "\n".join(f"{v.call}: {v.details}" for v in found)
            raise HarnessError(f"the hooks let {allowed} go and stopped {stopped}:\n{lines}")
        return found

    def made(self, here: Caller, there: Caller, world: World) -> list[tuple[str, Sent, list[str]]]:
        """Make the world's calls; return each result, what was sent, and which counters moved.

        Connections are forgotten before: one of the container's that got the source and port of
        the host's own would make NAT change that port.
        """
        self.namespaces.container.forget()
        own = iter(self.batch(here, [c for c in world.calls if not c.inside], world))
        self.namespaces.container.forget()
        inner = iter(self.batch(there, [c for c in world.calls if c.inside], world))
        return [next(inner if call.inside else own) for call in world.calls]

    def batch(
        self, caller: Caller, calls: list[Call], world: World
    ) -> list[tuple[str, Sent, list[str]]]:
        spis = {s.spi for s in world.states}
        results = caller([wire_words(call) for call in calls])
        seen = self.namespaces.capture.windows(len(calls))
        return [
            (name, answer(packets, call.dst, call.dport, spis), moved)
            for call, (name, moved), packets in zip(calls, results, seen, strict=True)
        ]

    # --- the first wrong answer ------------------------------------------------------------

    async def explain(self, world: World, verdict: Verdict) -> str:
        """Return a report of a wrong answer in the smallest world that shows it."""
        small, last = await self.shrink(replace(world, calls=(verdict.call,)), verdict)
        await self.namespaces.begin(small)
        way = self.namespaces.way(last.call)
        self.install(small)
        table = await self.namespaces.table()
        entries = "\n".join(
            f"  {entry.rank} {match} -> {entry.state.name}"
            for match, entry in sorted(table.entries(), key=lambda item: item[1].rank)
        )
        return (
            f"{last.wrong}\nthe gate: {last.gate}, the kernel: {last.kernel} ({last.details})\n"
            f"call: {last.call}\n"
            f"way: {way}, ephemeral port {small.port}\n"
            f"{small}\nthe gate's table:\n{entries}\n"
            f"repeat: ORACLE_SEED={world.seed} ORACLE_CASES={len(world.calls) or 1}\n"
            f"as found: {verdict.wrong}\n{world}"
        )

    async def shrink(self, world: World, verdict: Verdict) -> tuple[World, Verdict]:
        """Drop policies and states, many at first, as long as the answer stays wrong."""
        progress = self.shrinks
        while progress:
            progress = False
            for smaller in variants(world):
                found = await self.still_wrong(smaller)
                if found is not None:
                    world, verdict, progress = smaller, found, True
                    break
        return world, verdict

    async def still_wrong(self, world: World) -> Verdict | None:
        await self.namespaces.begin(world)
        installed, refused = self.install(world)
        if refused:
            return None
        try:
            (verdict,) = await self.verdicts(installed)
        except LayoutError:
            return None
        return verdict if verdict.wrong else None

    async def end(self) -> None:
        """Flush the kernel's databases and the hook table."""
        self.namespaces.installer.flush()
        await self.namespaces.data.publish(TableId.SPD, Table())


def variants(world: World) -> Iterator[World]:
    """Yield the world without some of its policies or states: all, half of them, a quarter, one."""
    for name in ("policies", "states", "routes", "nat"):
        items = getattr(world, name)
        size = len(items)
        while size:
            for at in range(0, len(items), size):
                yield replace(world, **{name: items[:at] + items[at + size :]})
            size //= 2


def wire_words(call: Call) -> list[Any]:
    """Return a call in the form that the calling process accepts."""
    prefix = "::ffff:" if call.mapped else ""
    bind = f"{prefix}{call.src}" if call.src else None
    words = [call.kind.value, f"{prefix}{call.dst}", call.dport, bind, call.sport, call.late]
    return [*words, call.mark, call.device]


def kernel_answer(call: Call, error: str, sent: Sent, moved: list[str], silent: bool) -> str:
    """Return what the kernel did. Raises: HarnessError if that is unclear.

    `silent`: XFRM's counters need not tell, because a tunnel device or forwarding drops packets.
    """
    if sent is Sent.NOTHING:
        told = silent or any(name.startswith("XfrmOut") for name in moved)
        if error in WENT_OUT and not told:
            raise HarnessError(f"{call}: nothing was sent, for no visible reason")
        return REFUSED
    if error not in WENT_OUT:
        raise HarnessError(f"{call}: {error}, but it was sent {sent.value}")
    return ANSWERS[sent]


def check(verdict: Verdict, model: Model, sent: Sent) -> Verdict:
    """Judge one call; `sent`: what the gated call itself put on the wire."""
    call, gate, kernel = verdict.call, verdict.gate, verdict.kernel
    wrong = reason = dropped = ""
    exception = kernel == CLEAR and model.passes(call)
    if gate == "refused" and sent is not Sent.NOTHING:
        wrong = f"refused, but it was sent {sent.value}"
    elif gate == "live" and ANSWERS[sent] != kernel:
        wrong = f"let through and sent {sent.value}, but the kernel's own answer is {kernel}"
    elif gate == "live" and kernel == CLEAR and not exception:
        wrong = "let through, and sent in clear"
    elif kernel not in (possible := model.answers(call)):
        wrong = f"the kernel's answer is {kernel}, its rules as read allow {sorted(possible)}"
    elif gate == "live" and kernel == REFUSED:
        dropped = drops(model, call)
        wrong = "" if dropped else "let through as covered, and dropped by the kernel"
    elif gate == "refused" and (kernel == COVERED or exception):
        reason = next(iter(reasons(model, call)), "")
        wrong = "" if reason else f"refused without a reason: the kernel's answer is {kernel}"
    return replace(verdict, reason=reason, wrong=wrong, dropped=dropped)
