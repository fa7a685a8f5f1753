"""What must happen outside, as data. The shell executes each and knows them all."""

from __future__ import annotations

from dataclasses import dataclass

from ipsecgate.core.model.events import Call, CallMade, Timer
from ipsecgate.core.model.flow import Address, Network
from ipsecgate.core.model.ipsec import ChildConfig, ChildName
from ipsecgate.core.state.floor import FloorPolicy
from ipsecgate.core.tables.layout import Entry, Key, TableId
from ipsecgate.core.tables.table import Table


@dataclass(frozen=True, slots=True)
class Publish:
    """Replace a table of the hooks."""

    table: TableId
    content: Table


@dataclass(frozen=True, slots=True)
class SetEntry:
    """Change one entry of the published table: one write, in force at once."""

    table: TableId
    index: int
    key: Key
    entry: Entry


@dataclass(frozen=True, slots=True)
class Verify:
    """Compare a table of the hooks with what was published, and mend it."""

    table: TableId
    content: Table


@dataclass(frozen=True, slots=True)
class SetSources:
    """Tell the hooks which source an unbound socket gets, by destination network."""

    sources: tuple[tuple[Network, Address | None], ...]


@dataclass(frozen=True, slots=True)
class SetTun:
    """Tell the backstop behind which interface the IKE daemon does ESP, by index; 0: none."""

    index: int


@dataclass(frozen=True, slots=True)
class CutOff:
    """End the sockets of gated cgroups whose flows are uncovered now (`Gate.is_cut_off`)."""


@dataclass(frozen=True, slots=True)
class ResolveSources:
    """Keep resolving the unbound source for these destinations (`SourcesResolved`)."""

    destinations: tuple[Network, ...]


@dataclass(frozen=True, slots=True)
class SetModes:
    """Set what holds beside the tables: audit, the default, the errno of its refusals."""

    audit: bool
    deny: bool
    error: int


@dataclass(frozen=True, slots=True)
class SetFloor:
    """Have the kernel block what leaves outside gated cgroups; none: no floor."""

    policies: tuple[FloorPolicy, ...]


@dataclass(frozen=True, slots=True)
class Adopted:
    """The new configuration (`Reconfigured`) is in force."""


@dataclass(frozen=True, slots=True)
class ExemptIke:
    """Exempt this process's sockets: the IKE daemon. 0: none."""

    pid: int


@dataclass(frozen=True, slots=True)
class AskIke:
    """Look at once what the IKE daemon has loaded (`IkeConnected`)."""


@dataclass(frozen=True, slots=True)
class Initiate:
    """Have IKE negotiate a CHILD_SA within `limit` seconds. Source: US 7,028,332 claim 1."""

    name: ChildName
    limit: float


@dataclass(frozen=True, slots=True)
class Terminate:
    """Have IKE delete a CHILD_SA that it believes in and the kernel has not, or not whole.

    `unique`: this one of its configuration; 0: all of them.
    """

    name: ChildName
    unique: int = 0


@dataclass(frozen=True, slots=True)
class StartTimer:
    """Answer with `TimerFired` after so many seconds; replaces a timer of the same name."""

    timer: Timer
    seconds: float


@dataclass(frozen=True, slots=True)
class StopTimer:
    """Forget a timer, running or not."""

    timer: Timer


@dataclass(frozen=True, slots=True)
class Hold:
    """Let a system call wait, and answer with `CallExpired` at its limit."""

    made: CallMade


@dataclass(frozen=True, slots=True)
class Answer:
    """Have a system call fail with an errno; None: let it go on, to be asked by the hooks."""

    call: Call
    error: int | None


@dataclass(frozen=True, slots=True)
class Remember:
    """Keep on disk what must be protected though no configuration file says so."""

    children: tuple[ChildConfig, ...]


@dataclass(frozen=True, slots=True)
class Log:
    """Tell the operator. `level` is logging's name: info, warning, error."""

    level: str
    text: str


HookCommand = Publish | SetEntry | Verify | SetSources | SetTun | SetModes | ExemptIke
"""What is written into the hooks' maps."""
IkeCommand = AskIke | Initiate | Terminate
CallCommand = Hold | Answer
Command = (
    HookCommand
    | IkeCommand
    | CallCommand
    | ResolveSources
    | CutOff
    | SetFloor
    | Adopted
    | StartTimer
    | StopTimer
    | Remember
    | Log
)
