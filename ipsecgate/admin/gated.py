"""The gated cgroups: by whom, with which hooks, and beside which other programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from ipsecgate.admin.documents import Awaited, Cgroups, GatedCgroup
from ipsecgate.admin.loader import check_targets, pins_of
from ipsecgate.admin.problem_document import Problem, problem_document
from ipsecgate.admin.status import ask_controller, controller_of
from ipsecgate.admin.status_document import ControllerStatus
from ipsecgate.edges.bpf import exclusive, order
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.edges.bpf.pins import Attachment
from ipsecgate.edges.host import cgroups
from ipsecgate.edges.host.config import Config
from ipsecgate.errors import GateError, UsageError
from ipsecgate.paths import Paths


def cgroups_of(paths: Paths, read_config: Callable[[], Config]) -> Cgroups:
    """Return the document. Raises: FileNotFoundError if nothing is loaded; OSError."""
    answer = ask_controller(paths)
    pins = pins_of(paths)
    if not pins.loaded:
        raise FileNotFoundError(pins.root)
    attachments = pins.attachments()
    by_id = cgroups.by_id()
    targets = _targets(answer, paths, read_config)
    named = cgroups.find_all(targets)
    gated = sorted({one.cgroup_id for one in attachments})
    tops = {by_id[number] for number in gated if number in by_id}
    return {
        "controller": controller_of(answer),
        "cgroups": [_gated(number, by_id.get(number), attachments, named) for number in gated],
        "awaited": list(_awaited(named, tops, answer["errors"] if answer else [])),
    }


def _targets(
    answer: ControllerStatus | None, paths: Paths, read_config: Callable[[], Config]
) -> tuple[str, ...]:
    """Return the targets in force; without a controller, those configured, or gated last."""
    if answer is not None:
        return tuple(answer["targets"])
    try:
        return check_targets(paths, read_config())
    except UsageError:
        from ipsecgate.edges.host import saved_state  # noqa: PLC0415 - seldom needed

        return saved_state.load_targets(paths.targets)


def _gated(
    number: int, path: Path | None, attachments: list[Attachment], named: dict[str, list[Path]]
) -> GatedCgroup:
    hooks = {one.hook for one in attachments if one.cgroup_id == number}
    by = next((target for target, found in named.items() if path in found), "by hand")
    return {
        "cgroup": str(path) if path is not None else "",
        "cgroup_id": number,
        "by": by if path is not None else "unknown",
        "hooks": [hook for hook in HOOKS if hook in hooks],
        "missing": [hook for hook in HOOKS if hook not in hooks],
        "processes": len(list(cgroups.processes(path))) if path is not None else None,
        "others": list(_others(path, attachments)) if path is not None else [],
        "warnings": _warnings(path, attachments) if path is not None else [],
    }


def _others(path: Path, attachments: list[Attachment]) -> Iterable[str]:
    """Yield the other programs of a cgroup itself, each with its hook."""
    own = {one.prog_id for one in attachments}
    for hook, kind in HOOKS.items():
        with suppress(OSError):  # it was removed meanwhile
            for ident in exclusive.programs(path, kind.attach_type):
                if ident not in own:
                    yield f"{hook}: {exclusive.describe(ident)}"


def _warnings(path: Path, attachments: list[Attachment]) -> list[Problem]:
    try:
        return [problem_document(one.problem) for one in order.later(path, attachments)]
    except (OSError, GateError):
        return []


def _awaited(
    named: dict[str, list[Path]], gated: set[Path], errors: Iterable[Problem]
) -> Iterable[Awaited]:
    """Yield the targets that name no cgroup, or one that is not gated."""
    for target, found in named.items():
        if not found:
            text = "it will be gated when it appears"
            yield {"target": target, "text": text, "advice": ""}
        for path in found:
            if path not in gated:
                unknown: Problem = {"text": f"{path} is not gated", "advice": ""}
                cause = next((one for one in errors if str(path) in one["text"]), unknown)
                yield {"target": target, **cause}
