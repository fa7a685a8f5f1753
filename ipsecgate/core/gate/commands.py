"""What the gate wants done outside, as data. The controller carries out each command."""

from __future__ import annotations

from ipsecgate.core.model.events import Call, CallMade, Timer
from ipsecgate.core.model.flow import Flow, FlowPath, Network, Origin
from ipsecgate.core.model.ipsec import Acquire, ChildConfig, ChildName, Sa
from ipsecgate.core.model.policy import FloorPolicy
from ipsecgate.core.model.value import value
from ipsecgate.core.tables.layout import Entry, TableId
from ipsecgate.core.tables.table import Table, Ternary


@value
class Publish:
    """Replace a hook table."""

    table: TableId
    content: Table


@value
class Change:
    """Change some entries of a published table, all at once; None: remove one."""

    table: TableId
    entries: dict[Ternary, Entry | None]


@value
class Verify:
    """Compare a hook table with what was published, and repair it."""

    table: TableId
    content: Table


@value
class SetPaths:
    """Set in the hooks where routing leads the flows of an origin, by destination network.

    No path: its flows are refused. `bound_too` and `marks`: the settings PATHS and MARKS.
    """

    origin: Origin
    paths: tuple[tuple[Network, FlowPath], ...]
    bound_too: int
    marks: int


@value
class SetTunnels:
    """Have the backstop pass packets into the devices with these interface indexes."""

    indexes: frozenset[int]


@value
class CutOff:
    """Close the sockets of gated cgroups that have lost their SA (`Gate.is_cut_off`)."""


@value
class ResolvePaths:
    """Resolve the paths to these destinations from now on (`PathsResolved`)."""

    destinations: tuple[Network, ...]


@value
class FollowOrigin:
    """Resolve the paths of the flows that begin there as well. `pid`: a process there, or 0."""

    origin: Origin
    pid: int


@value
class SetModes:
    """Set audit mode, whether flows without a policy are denied, and with which errno."""

    audit: bool
    deny: bool
    error: int


@value
class SetFloor:
    """Replace the host floor, which blocks unprotected packets of every process; empty: none."""

    policies: tuple[FloorPolicy, ...]


@value
class Adopted:
    """Report that the new configuration (`Reconfigured`) is in force."""


@value
class ExemptIke:
    """Exempt the sockets of the IKE daemon. `pid` 0: none."""

    pid: int


@value
class AskIke:
    """List what the IKE daemon has loaded, without waiting for a poll (`IkeConnected`)."""


@value
class Initiate:
    """Have IKE negotiate a CHILD_SA within `limit` seconds. Source: US 7,028,332 claim 1.

    `acquire`: names the peer of a wildcard, which the daemon learns only from the kernel.
    """

    name: ChildName
    limit: float
    acquire: Acquire | None = None


@value
class Terminate:
    """Have IKE delete a CHILD_SA that the kernel has lost, or half of it.

    `unique`: the number that IKE gave it; 0: every CHILD_SA of the configuration.
    """

    name: ChildName
    unique: int = 0


@value
class StartTimer:
    """Deliver `TimerFired` after so many seconds; replaces a running timer of the same name."""

    timer: Timer
    seconds: float


@value
class StopTimer:
    """Stop a timer, if it runs."""

    timer: Timer


@value
class Hold:
    """Let a system call wait, and deliver `CallExpired` at its limit."""

    made: CallMade


@value
class Answer:
    """Have a held call fail with an errno; None: let it continue, and the hooks check it."""

    call: Call
    error: int | None


@value
class Remember:
    """Keep the children on disk that policies were derived from."""

    children: tuple[ChildConfig, ...]


@value
class Covered:
    """Report that a live SA protects a flow which was refused, for the first time since `at`.

    `at`: see `FlowRefused`. `child`: the child whose SA it is, None: not known. `sa`: the SA, None
    if the IKE daemon does ESP itself.
    """

    flow: Flow
    policy: str
    at: float
    child: ChildName | None = None
    sa: Sa | None = None


@value
class Log:
    """Log a message. `level`: info, warning or error.

    One that is logged again and again is counted instead, unless it reports a change. `about`: what
    repeated messages share whose text differs, such as in a number. `fields`: what the message is
    about, for a search: `event`, `child`, `flow`, `policy`, `cause`.
    """

    level: str
    text: str
    about: str = ""
    is_change: bool = False
    fields: tuple[tuple[str, str], ...] = ()


HookWrite = Publish | Change | SetPaths | SetTunnels | SetModes | ExemptIke
"""Commands that write to the hooks' maps."""
IkeCommand = AskIke | Initiate | Terminate
CallCommand = Hold | Answer
Command = (
    HookWrite
    | Verify
    | IkeCommand
    | CallCommand
    | ResolvePaths
    | FollowOrigin
    | CutOff
    | SetFloor
    | Adopted
    | StartTimer
    | StopTimer
    | Remember
    | Covered
    | Log
)
