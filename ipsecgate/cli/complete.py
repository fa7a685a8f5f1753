"""Completion of live values: each function is the `shell_complete` of a click parameter.

    @click.argument("target", shell_complete=complete.targets)

Rules of this module: a completion changes nothing, prints nothing and takes no longer than a
keystroke may. What cannot be read, because nothing runs or the caller is not root, is left out.
Nothing that has a control character in it is offered.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from ipsecgate.core.model.value import value
from ipsecgate.errors import GateError
from ipsecgate.paths import DEFAULT_CONFIG, DEFAULT_INSTANCE, Paths
from ipsecgate.printable import printable

PATIENCE = 0.1  # seconds for the controller's answer
FLOWS = 20  # of the last refusals
REFUSALS = ("refused", "blocked")
PROTOCOLS = {6: "", 17: "/udp"}  # as `why` takes them

Found = Iterator[tuple[str, str]]
"""Values, each with what it is, or ""."""
Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]


@value
class Asked:
    """What is completed: the instance that the line names, and what was typed of the word."""

    paths: Paths
    typed: str


def live(find: Callable[[Asked], Found]) -> Completer:
    """Make a completer of a function that yields values, also those that do not fit."""

    @wraps(find)
    def complete(context: click.Context, _: click.Parameter, typed: str) -> list[CompletionItem]:
        found: dict[str, str] = {}
        with suppress(GateError, OSError):
            for text, about in find(Asked(_paths(context), typed)):
                if text.startswith(typed) and text == printable(text):
                    found.setdefault(text, printable(about))
        return [CompletionItem(text, help=about or None) for text, about in found.items()]

    return complete


def _paths(context: click.Context) -> Paths:
    """Return the paths that the global options on the line, or the environment, select."""
    given = context.find_root().params
    return Paths(
        given["config"] or DEFAULT_CONFIG,
        given["instance"],
        given["bpffs"],
        given["run_dir"],
        given["cache_dir"],
    )


def targets(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Complete unit:, container:, label: and pod: targets, and the path of a cgroup."""
    if typed.startswith("/"):
        return [CompletionItem(typed, type="dir")]
    return _targets(context, parameter, typed)


@live
def _targets(_: Asked) -> Found:
    yield from _named("unit:", "container:")
    from ipsecgate.edges.host import cgroups, container_targets  # noqa: PLC0415

    known = cgroups.containers().values()
    yield from sorted((one, "") for each in known for one in container_targets.descriptions(each))
    yield f"{cgroups.root()}/", "path of a cgroup"


@live
def units(_: Asked) -> Found:
    """Complete the name of one of the system's services or slices."""
    for target, about in _named("unit:"):
        yield target.removeprefix("unit:"), about


@live
def containers(_: Asked) -> Found:
    """Complete the name of a container."""
    for target, about in _named("container:"):
        yield target.removeprefix("container:"), about


def _named(*kinds: str) -> Found:
    """Yield the targets of these kinds, and their cgroups."""
    from ipsecgate.edges.host import cgroups  # noqa: PLC0415

    known = cgroups.containers() if "container:" in kinds else {}
    root = cgroups.root()
    found = [
        (target, f"/{path.relative_to(root)}")
        for path in cgroups.walk()
        for target in cgroups.targets_of(path, known)
        if target.startswith(kinds)
    ]
    yield from sorted(found, key=lambda pair: (pair[0].endswith(".slice"), pair))


@live
def gated(asked: Asked) -> Found:
    """Complete a gated cgroup: as a unit or container, by its path, by its id if it is removed."""
    from ipsecgate.edges.host import cgroups  # noqa: PLC0415

    by_id, known = cgroups.by_id(), cgroups.containers()
    for number in _gated_ids(asked.paths):
        path = by_id.get(number)
        if path is None:
            yield str(number), "removed, but still gated"
            continue
        for target in cgroups.targets_of(path, known):
            yield target, str(path)
        yield str(path), "gated cgroup"


def _gated_ids(paths: Paths) -> list[int]:
    """Return the ids of the gated cgroups: `edges.bpf.pins` names the links after them."""
    links = os.listdir(paths.bpffs / "ipsecgate" / paths.instance / "links")  # noqa: PTH208
    return sorted({int(number) for _, _, number in (name.partition("-") for name in links)})


@live
def pids(asked: Asked) -> Found:
    """Complete a pid: first of the processes in gated cgroups, then of all processes."""
    if not asked.typed:
        found = list(_processes(_gated_pids(asked.paths)))
        if found:
            yield from found
            return
    every = (int(name) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208
    yield from _processes(sorted(pid for pid in every if str(pid).startswith(asked.typed)))


def _gated_pids(paths: Paths) -> Iterator[int]:
    from ipsecgate.edges.host import cgroups  # noqa: PLC0415

    with suppress(OSError):
        by_id = cgroups.by_id()
        for number in _gated_ids(paths):
            if number in by_id:
                yield from cgroups.processes(by_id[number])


def _processes(numbers: Iterable[int]) -> Found:
    """Yield pids and names of processes; threads of the kernel have no command line."""
    for pid in numbers:
        with suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes():
                yield str(pid), Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()


@live
def policies(asked: Asked) -> Found:
    """Complete the name of a policy: those in force, or configured if no controller runs."""
    answer = _controller(asked.paths, "status")
    if answer:
        for policy in answer["policies"]:
            yield policy["name"], f"{policy['action']} {' '.join(policy['remote'])}"
        return
    from ipsecgate.core.model.policy import derived_policies, in_force  # noqa: PLC0415
    from ipsecgate.edges.host import config, saved_state  # noqa: PLC0415

    configured = config.load(asked.paths.config, required=False).settings.policies
    derived = derived_policies(saved_state.load_children(asked.paths.remembered))
    for each in in_force(configured, derived):
        yield each.name, f"{each.action.name.lower()} {' '.join(map(str, each.remote))}"


@live
def children(asked: Asked) -> Found:
    """Complete a child of strongSwan's connections: those loaded, or remembered."""
    answer = _controller(asked.paths, "status")
    if answer:
        yield from ((child, "") for child in answer["children"])
        return
    from ipsecgate.edges.host import saved_state  # noqa: PLC0415

    for child in saved_state.load_children(asked.paths.remembered):
        yield str(child.name), " ".join(str(selector.network) for selector in child.remote)


def needs(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Complete a policy or a child."""
    return [*policies(context, parameter, typed), *children(context, parameter, typed)]


def names(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Complete the name of a policy or a child."""
    found = (*policies(context, parameter, typed), *children(context, parameter, typed))
    return list({item.value: item for item in found}.values())


@live
def flows(asked: Asked) -> Found:
    """Complete a flow that was refused lately, the last one first."""
    answer = _controller(asked.paths, "events", since=0)
    refusals = [record for record in answer.get("events", ()) if record["kind"] in REFUSALS]
    for record in reversed(refusals[-FLOWS:]):
        host = f"[{record['daddr']}]" if ":" in record["daddr"] else record["daddr"]
        if record["proto"] in PROTOCOLS:
            flow = f"{host}:{record['dport']}{PROTOCOLS[record['proto']]}"
            yield flow, f"{record['kind']}: {record['comm'] or 'unknown process'}"


def _controller(paths: Paths, verb: str, **fields: Any) -> dict[str, Any]:
    """Return the controller's answer, {} if there is none."""
    from ipsecgate.edges.host import control  # noqa: PLC0415

    with suppress(GateError), control.connected(paths.control, PATIENCE) as ask:
        return ask(verb, **fields)
    return {}


@live
def instances(asked: Asked) -> Found:
    """Complete the name of an instance that is loaded, or that has a controller."""
    yield DEFAULT_INSTANCE, ""
    for folder, about in ((asked.paths.bpffs / "ipsecgate", "loaded"), (asked.paths.run, "")):
        with suppress(OSError):
            for path in sorted(folder.iterdir()):
                if about or (path / "control.sock").exists():
                    yield path.name, about


@live
def users(_: Asked) -> Found:
    """Complete a user of this machine; other sources of users may be slow."""
    for line in Path("/etc/passwd").read_text(errors="replace").splitlines():
        name, *rest = line.split(":")
        yield name, rest[3] if len(rest) > 3 else ""


def command(context: click.Context, parameter: click.Parameter, typed: str) -> list[CompletionItem]:
    """Complete a program, and then files as its arguments."""
    if context.params.get(parameter.name or "") or "/" in typed:
        return [CompletionItem(typed, type="file")]
    return _programs(context, parameter, typed)


@live
def _programs(asked: Asked) -> Found:
    for folder in os.environ.get("PATH", "").split(":"):
        with suppress(OSError):
            for name in sorted(os.listdir(folder)):  # noqa: PTH208
                if name.startswith(asked.typed) and os.access(f"{folder}/{name}", os.X_OK):
                    yield name, ""
