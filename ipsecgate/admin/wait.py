"""Wait until flows, policies or children are covered by live SAs; end the CHILD_SAs of one.

Each request to the controller waits there for news, `TURN` seconds at most. A controller that is
not there yet is tried again until the time is over, as at boot.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict, cast

from ipsecgate.core.model.flow import Flow
from ipsecgate.edges.host import control
from ipsecgate.edges.host.control import REQUEST_LIMIT
from ipsecgate.errors import NoControllerError, UsageError
from ipsecgate.paths import Paths

TURN = 20.0  # seconds that one request waits
RETRY = 0.25  # seconds until a controller is tried again, and up to as much more
SLACK = 10.0  # seconds that a busy controller may take for its answer
FOREVER = float("inf")


class Target(TypedDict):
    """How far one thing is that is waited for."""

    target: str  # as the operator named it
    kind: Literal["flow", "policy", "name"]
    state: Literal["covered", "waiting", "never"]  # never: only another configuration changes it
    flows: int  # that stand for it
    covered_flows: int
    flow: str | None  # the first that is not covered
    network: str | None  # that flow's, if its policy has several
    child: str | None  # the child that protects its flows, or would protect that one
    negotiation: str | None  # its coverage: uncovered, negotiating, covered, back-off
    attempts: int
    cause: str  # why it is not covered, in IKE's words if IKE failed; "" if it is
    advice: str  # what to do, "" if there is nothing


def named(target: Target) -> str:
    """Return a target's name; with the network or child that is missing, if that says more."""
    child, name = target["child"] or "", target["target"]
    told = [target["network"]] if target["network"] not in (None, name) else []
    if target["cause"].startswith(f"child {child}: ") and child not in (name, f"{name}/{name}"):
        told.append(f"child {child}")
    return f"{name} ({', '.join(map(str, told))})" if told else name


def cause_of(target: Target) -> str:
    """Return why a target is not covered; `named` has the child."""
    return target["cause"].removeprefix(f"child {target['child']}: ")


class Waited(TypedDict):
    """The result of `wait` and `up`."""

    covered: bool  # everything
    timed_out: bool
    seconds: float  # how long it took
    targets: list[Target]


class EndedSa(TypedDict):
    """A CHILD_SA that `down` has ended, or tried to."""

    child: str
    spi: str  # of the outbound SA, in hexadecimal
    peer: str
    ended: bool


class Down(TypedDict):
    """The result of `down`."""

    sas: list[EndedSa]
    policies: list[str]  # those whose flows were protected by them
    starts: list[str]  # those of them that are negotiated again at once, without a flow


@dataclass
class Wish:
    """What to wait for. `flows` by the operator's words; `names`: policies or children."""

    flows: dict[str, list[Flow]] = field(default_factory=dict)
    policies: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    every: bool = False  # every policy that protects
    negotiate: bool = True

    def words(self) -> dict[str, Any]:
        """Return the fields of a request. Raises: UsageError if they are too many."""
        found = {
            "flows": [
                [name, str(flow.daddr), flow.proto, flow.dport]
                for name, flows in self.flows.items()
                for flow in flows
            ],
            "policies": self.policies,
            "names": self.names,
            "every": self.every,
            "negotiate": self.negotiate,
        }
        if len(str(found)) > REQUEST_LIMIT - 256:
            raise UsageError("too many targets for one wait", hint="use --all, or wait twice")
        return found


def wait(
    paths: Paths, wish: Wish, limit: float, tell: Callable[[Waited | None], None] | None = None
) -> Waited:
    """Wait for `limit` seconds at most; the result says whether everything is covered.

    `tell` is called with each change, and with None while no controller answers; without it, only
    the end is of interest. Raises: NoControllerError if none answers at the end; GateError.
    """
    began = time.monotonic()
    words, seen = wish.words(), ""
    while True:
        left = max(0.0, began + limit - time.monotonic())
        try:
            answer = _ask(paths, "wait", min(left, TURN), **words, seen=seen if tell else None)
        except NoControllerError as error:
            left = began + limit - time.monotonic()
            if left <= 0:
                raise _still_no_controller(error, limit) from error
            if tell:
                tell(None)
            time.sleep(min(left, RETRY * (1 + random.random())))  # noqa: S311
            continue
        seen = answer.pop("seen")
        seconds = time.monotonic() - began
        is_final = any(target["state"] == "never" for target in answer["targets"])
        timed_out = not answer["covered"] and not is_final and seconds >= limit
        found = cast(Waited, {**answer, "timed_out": timed_out, "seconds": round(seconds, 3)})
        if answer["covered"] or is_final or timed_out:
            return found
        if tell:
            tell(found)


def down(paths: Paths, name: str, limit: float) -> Down:
    """End the CHILD_SAs of a policy or child, and wait until they are gone, for `limit` seconds.

    Raises: NoControllerError, UsageError, GateError.
    """
    return cast(Down, _ask(paths, "down", limit, name=name))


def _ask(paths: Paths, verb: str, limit: float, **words: Any) -> dict[str, Any]:
    with control.connected(paths.control, limit + SLACK) as ask:
        return ask(verb, **words, limit=limit)


def _still_no_controller(error: NoControllerError, limit: float) -> NoControllerError:
    return NoControllerError(f"{error}, tried for {limit:.3g} s", hint=error.hint)
