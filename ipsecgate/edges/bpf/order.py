"""Programs of other tools that run after the gate's, and may give a call another destination.

The kernel runs the programs of a cgroup in the order in which they were attached, and then those of
the cgroups above it. A load balancer in a sock_addr program (Cilium's) rewrites the destination. If
it runs first, the gate sees where the packets go; if it runs later, only the backstop does.

Source: compute_effective_progs() in Linux's kernel/bpf/cgroup.c.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ipsecgate.core.model.problem import Problem
from ipsecgate.core.model.value import value
from ipsecgate.edges.bpf import exclusive
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.edges.bpf.pins import Attachment

REWRITING = ("connect4", "connect6", "sendmsg4", "sendmsg6")  # egress changes no destination
OURS = re.compile(r"(connect|sendmsg)[46]_[0-9a-f]+")  # what an instance's programs are named


@value
class Later:
    """A program of another tool that runs after the gate's at a hook of a gated cgroup.

    `cgroup`: where it is attached: that cgroup itself, or one above it.
    """

    hook: str
    gated: Path
    cgroup: Path
    program: str

    @property
    def can_be_overtaken(self) -> bool:
        """Tell whether the gate's program runs last again if it is attached anew."""
        return self.gated == self.cgroup

    @property
    def problem(self) -> Problem:
        """What that may do to the gate."""
        return Problem(
            f"{self.hook} of {self.gated}: {self.program} at {self.cgroup} runs after the gate's, "
            "and may change the destination that it has checked; what must be protected is then "
            "blocked instead of refused or held",
            f"gate {self.cgroup} with all processes below it, too; `bpftool cgroup tree` shows the "
            "programs",
        )


def later(cgroup: Path, attachments: list[Attachment]) -> Iterator[Later]:
    """Yield the programs of other tools that run after the gate's in a gated cgroup.

    Raises: OSError.
    """
    by_cgroup = {(one.cgroup_id, one.hook): one.prog_id for one in attachments}
    for hook in REWRITING:
        found: list[Later] = []
        for path in (cgroup, *cgroup.parents):
            if not (path / "cgroup.procs").is_file():
                break  # above the root
            ids = exclusive.programs(path, HOOKS[hook].attach_type)
            own = by_cgroup.get((path.stat().st_ino, hook))
            after = ids[ids.index(own) + 1 :] if own in ids else ids
            if own is not None:
                found = []  # ours here sees what those below have made of it
            names = map(exclusive.describe, after)
            found += [Later(hook, cgroup, path, name) for name in names if not _is_ours(name)]
        yield from found


def _is_ours(description: str) -> bool:
    return OURS.search(description) is not None
