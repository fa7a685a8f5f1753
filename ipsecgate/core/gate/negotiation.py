"""One negotiation, why it was asked for, and what a change of it means for everything else."""

from __future__ import annotations

from dataclasses import dataclass, field

from ipsecgate.core.gate import commands as do
from ipsecgate.core.gate.coverage import Coverage
from ipsecgate.core.gate.routing import Routed
from ipsecgate.core.model.flow import Flow
from ipsecgate.core.model.ipsec import Acquire, ChildName
from ipsecgate.core.model.problem import Cause
from ipsecgate.core.model.value import value


@value
class Need:
    """A refused flow, the same as routed, and the policy that has it protected.

    `choices`: the children of which any would do. `acquire`: see `do.Initiate`.
    """

    flow: Flow
    routed: Routed
    place: int  # of the policy
    policy: str  # its name
    choices: tuple[ChildName, ...] = ()
    acquire: Acquire | None = None


@dataclass
class Negotiation:
    """One child's state, and the flow that shows whether the child is covered."""

    flow: Flow
    place: int  # of the policy that asked
    policy: str  # its name
    choices: tuple[ChildName, ...] = ()  # see `Need`
    acquire: Acquire | None = None
    coverage: Coverage = Coverage.UNCOVERED
    attempts: int = 0
    failures: int = 0  # in a row
    limit: float = 0.0  # seconds for the last attempt
    reported_up: bool = False  # by IKE; the kernel has yet to show the SA
    last_error: Cause | None = None
    failed_at: float = 0.0  # when that was; wall clock, seconds since the epoch
    logged_error: Cause | None = None  # the last one that was logged

    @classmethod
    def of(cls, need: Need) -> Negotiation:
        """Return one that has not begun."""
        return cls(need.flow, need.place, need.policy, need.choices, need.acquire)

    def forgive(self) -> None:
        """Forget the last error: it is outdated."""
        self.last_error = self.logged_error = None

    def asked_for(self, need: Need) -> None:
        """Replace what asked for it."""
        self.flow, self.place, self.policy = need.flow, need.place, need.policy
        self.choices, self.acquire = need.choices, need.acquire


@dataclass(slots=True)
class Outcome:
    """The commands to carry out, and what else has changed."""

    commands: list[do.Command] = field(default_factory=list)
    children: set[ChildName] = field(default_factory=set)  # whose coverage changed
    # Policies whose errno may change: the coverages of the children that each asked for, by place.
    coverages: dict[int, set[Coverage]] = field(default_factory=dict)

    def add(self, other: Outcome) -> None:
        """Append what happened next."""
        self.commands += other.commands
        self.children |= other.children
        self.coverages |= other.coverages
