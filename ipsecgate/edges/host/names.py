"""Look up host names, all at once and for a limited time."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Iterable

from ipsecgate.core.model.flow import Address, parse_address

TIME_LIMIT = 3.0  # seconds for all of them


def resolve(
    names: Iterable[str], limit: float = TIME_LIMIT
) -> tuple[dict[str, frozenset[Address]], dict[str, str]]:
    """Return the addresses of the names that resolve, and why the others do not.

    A lookup that takes longer goes on in a thread, which does not keep the process alive.
    """
    wanted = set(names)
    answers: queue.SimpleQueue[tuple[str, frozenset[Address] | str]] = queue.SimpleQueue()
    for name in wanted:
        threading.Thread(target=_look_up, args=(name, answers), daemon=True).start()
    found: dict[str, frozenset[Address]] = {}
    failed: dict[str, str] = {}
    deadline = time.monotonic() + limit
    while len(found) + len(failed) < len(wanted):
        try:
            name, answer = answers.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        if isinstance(answer, str):
            failed[name] = answer
        else:
            found[name] = answer
    for name in wanted - found.keys() - failed.keys():
        failed[name] = f"no answer within {limit:g} s"
    return found, failed


def _look_up(name: str, answers: queue.SimpleQueue[tuple[str, frozenset[Address] | str]]) -> None:
    try:
        answer = socket.getaddrinfo(name, None, proto=socket.IPPROTO_UDP)
    except (OSError, UnicodeError) as error:
        answers.put((name, getattr(error, "strerror", None) or str(error)))
    else:
        answers.put((name, frozenset(parse_address(str(one[4][0])) for one in answer)))
