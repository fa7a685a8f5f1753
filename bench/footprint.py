"""What the controller costs: time to load, memory, wake-ups, events a second, start-up.

    .venv/bin/python -m bench.footprint [PART …] [--json FILE]

Real processes, and real kernel policies in a network namespace of this machine's kernel, which need
no ESP. Processor time is what the controller itself used, so a busy machine changes it little.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table as Screen

from bench.gate_process import Controller, Gate
from bench.report import Report, Row
from bench.takeover import takeover

SETTLE, IDLE = 33.0, 25.0  # seconds: after the last early look for an IKE daemon, before the check
# Runs first in the controller: at its end it writes its longest callback, in seconds of its
# processor time, to a file. The first one is left out: it loads the hooks and opens the maps, and
# nothing is followed yet that could wait for it.
WATCH = """
import asyncio.events, atexit, time
_run, _turns = asyncio.events.Handle._run, [0.0]
def timed(handle):
    began = time.thread_time()
    _run(handle)
    took = time.thread_time() - began
    if len(_turns) == 1:
        _turns.append(0.0)
    else:
        _turns[1] = max(_turns[1], took)
asyncio.events.Handle._run = timed
atexit.register(lambda: open({file!r}, "w").write(str(_turns[-1])))
"""


def memory(pid: int) -> tuple[float, float]:
    """Return a process's resident memory and its share of shared pages (PSS), in MiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split()[0]: int(line.split()[1]) / 1024 for line in lines}
    return sizes["Rss:"], sizes["Pss:"]


def wakeups(pid: int) -> int:
    """Return how often the threads of a process went to sleep so far."""
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        lines = (task / "status").read_text().splitlines()
        total += sum(int(line.split()[1]) for line in lines if line.startswith("voluntary"))
    return total


# --- what is measured ---------------------------------------------------------------------


def load(sizes: Sequence[int] = (1000, 10_000, 100_000)) -> Iterator[Row]:
    """From the start with so many kernel policies to READY, less the start with none."""
    with ExitStack() as stack:
        gate = Gate(stack)
        longest = gate.folder / "longest"
        with gate.controller() as running:
            pass  # compiles the hooks and the modules
        have = 0
        for size in (0, *sizes):
            if size:
                gate.policies("delete", have)
                gate.policies("add", size)
                have = size
            wall, cpu, turns = [], [], []
            for _ in range(3):
                with gate.controller(WATCH.format(file=str(longest))) as running:
                    wall.append(running.ready_after)
                    cpu.append(running.ready_cpu)
                turns.append(float(longest.read_text()) * 1000)
            if not size:
                start_wall, start_cpu = median(wall), median(cpu)
                continue
            of = {"policies": size}
            yield Row("dump to published", "s", tuple(w - start_wall for w in wall), of)
            yield Row("processor time of it", "s", tuple(c - start_cpu for c in cpu), of)
            yield Row("longest turn of the loop", "ms", tuple(turns), of)


def memory_of(sizes: Sequence[int] = (100, 10_000, 100_000)) -> Iterator[Row]:
    """Resident memory with so many kernel policies, and of the inspector process."""
    with ExitStack() as stack:
        gate = Gate(stack)
        with gate.controller():
            pass  # compiles the modules
        have = 0
        for size in sizes:
            if have:
                gate.policies("delete", have)
            gate.policies("add", size)
            have = size
            with gate.controller() as running:
                time.sleep(1)
                resident, share = memory(running.pid)
                of = {"policies": size}
                yield Row("resident memory", "MiB", (resident,), of)
                yield Row("its share of shared pages (PSS)", "MiB", (share,), of)
                if size == sizes[0]:
                    inspector = held(gate, stack, running)
                    time.sleep(1)
                    resident, share = memory(inspector)
                    yield Row("inspector: resident memory", "MiB", (resident,))
                    yield Row("inspector: its share (PSS)", "MiB", (share,))


def held(gate: Gate, stack: ExitStack, running: Controller) -> int:
    """Have a process's calls held; return the inspector's pid."""
    process = gate.popen(
        [sys.executable, "-m", "ipsecgate", *gate.argv("exec", "--", "sleep", "600")],
        preexec_fn=lambda: (gate.cgroup / "cgroup.procs").write_text("0"),
    )
    stack.callback(process.wait)
    stack.callback(process.kill)
    deadline = time.monotonic() + 20
    while (found := running.inspector()) is None:
        if time.monotonic() > deadline:
            raise TimeoutError("no inspector")
        time.sleep(0.05)
    return found


def idle(seconds: float = IDLE) -> Iterator[Row]:
    """Wake-ups a second while nothing happens, between two of the checks that come every minute."""
    with ExitStack() as stack:
        gate = Gate(stack)
        gate.policies("add", 100)
        with gate.controller() as running:
            inspector = held(gate, stack, running)
            time.sleep(SETTLE)
            pids = {"controller": running.pid, "inspector": inspector}
            before = {name: wakeups(pid) for name, pid in pids.items()}
            cpu = running.cpu()
            time.sleep(seconds)
            for name, pid in pids.items():
                rate = (wakeups(pid) - before[name]) / seconds
                yield Row("wake-ups", "1/s", (rate,), {"process": name})
            used = (running.cpu() - cpu) / seconds * 1000
            yield Row("processor time", "ms/s", (used,), {"process": "controller"})


def events(rate: float = 50_000, seconds: float = 5.0) -> Iterator[Row]:
    """Real notifications at a rate, and in bursts: those lost, and the time until all is done."""
    with ExitStack() as stack:
        gate = Gate(stack)
        gate.policies("add", 1000)
        longest = gate.folder / "longest"
        with gate.controller(WATCH.format(file=str(longest))) as running:
            cpu = running.cpu()
            sent = gate.policies("update", 1000, "--rate", str(rate), "--seconds", str(seconds))
            behind = settle(running)
            of = {"events": f"{rate:.0f}/s for {seconds:.0f} s, 1,000 policies replaced in turn"}
            yield Row("sent", "1/s", (sent,), of)
            yield Row("overruns", "", (running.overruns(),), of)
            yield Row("done after the last one", "s", (behind,), of)
            used = (running.cpu() - cpu) / sent / seconds
            yield Row("processor time of each", "us", (used * 1e6,), of)
        gate.policies("delete", 1000)
        for burst in (50_000, 100_000, 200_000):
            with gate.controller(WATCH.format(file=str(longest))) as running:
                cpu = running.cpu()
                of = {"events": f"{burst:,} policies added in one burst"}
                yield Row("sent", "1/s", (gate.policies("add", burst),), of)
                yield Row("done after the last one", "s", (settle(running),), of)
                yield Row("overruns", "", (running.overruns(),), of)
                used = (running.cpu() - cpu) / burst
                yield Row("processor time of each", "us", (used * 1e6,), of)
            yield Row("longest turn of the loop", "ms", (float(longest.read_text()) * 1000,), of)
            gate.policies("delete", burst)


def settle(running: Controller) -> float:
    """Wait until the controller has no more work; return the seconds that took."""
    began, last = time.monotonic(), -1.0
    quiet = began
    while time.monotonic() - quiet < 0.3:
        if running.cpu() != last:
            last, quiet = running.cpu(), time.monotonic()
        time.sleep(0.02)
    return quiet - began


def start(runs: int = 9) -> Iterator[Row]:
    """Warm start until READY, and verbs: hooks loaded, everything cached."""
    with ExitStack() as stack:
        gate = Gate(stack)
        gate.policies("add", 100)
        with gate.controller():
            gate.verb("status")
        started, cpu = [], []
        for _ in range(runs):
            with gate.controller() as running:
                started.append(running.ready_after * 1000)
                cpu.append(running.ready_cpu * 1000)
        yield Row("warm start to enforcing", "ms", tuple(started))
        yield Row("warm start to enforcing: processor time", "ms", tuple(cpu))
        with gate.controller():
            for words in (("--help",), ("status",), ("--json", "status"), ("events",)):
                wall, cpu = [], []
                for _ in range(runs):
                    began = time.monotonic()
                    cpu.append(gate.verb(*words) * 1000)
                    wall.append((time.monotonic() - began) * 1000)
                of = {"verb": " ".join(words)}
                yield Row("answers after", "ms", tuple(wall), of)
                yield Row("processor time", "ms", tuple(cpu), of)


PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "load": load, "takeover": takeover, "memory": memory_of, "idle": idle, "events": events,
    "start": start,
}  # fmt: skip


def main() -> None:
    """Measure the parts that were asked for, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=[])
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows: list[Row] = []
    screen = Screen(title="The controller's footprint")
    for name in ("quantity", "of", "median", "quartiles", "unit"):
        screen.add_column(name, justify="right" if name in ("median", "quartiles") else "left")
    for part in options.parts or PARTS:
        for row in PARTS[part]():
            rows.append(row)
            low, high = row.quartiles
            of = ", ".join(f"{value} {key}" if isinstance(value, int) else str(value)
                           for key, value in row.of.items())  # fmt: skip
            screen.add_row(row.name, of, f"{row.median:.4g}", f"{low:.4g} to {high:.4g}", row.unit)
            sys.stderr.write(f"{row.name} [{of}]: {row.median:.4g} {row.unit}\n")
    Console().print(screen)
    if options.json:
        Report("footprint", "The controller's footprint", tuple(rows)).write(options.json)


if __name__ == "__main__":
    main()
