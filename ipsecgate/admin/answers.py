"""Whether an answer of the controller has the form that this version declares for it.

The controller may be of another version: a package was upgraded, and it has not been restarted yet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints, is_typeddict

from ipsecgate.errors import GateError

T = TypeVar("T")


def checked(answer: Mapping[str, Any], declared: type[T]) -> T:
    """Return an answer as the TypedDict that it must be. Raises: GateError if it is another."""
    if where := _misfit(answer, declared, ""):
        raise GateError(
            f"the controller is of another version: its answer has no valid {where}",
            hint="restart it: `systemctl restart ipsecgate`; covered flows go on meanwhile",
        )
    return cast(T, answer)


def _misfit(found: Any, declared: Any, where: str) -> str:
    """Return the first place that is missing or of another kind, "" if none is.

    Of a list only the first item is looked at: the same code has made all of them.
    """
    if is_typeddict(declared):
        if not isinstance(found, dict):
            return where
        hints = get_type_hints(declared)
        for name, kind in hints.items():
            place = f"{where}.{name}".lstrip(".")
            if name not in found or (place := _misfit(found[name], kind, place)):
                return place
        return ""
    if get_origin(declared) is list:
        if not isinstance(found, list):
            return where
        return _misfit(found[0], get_args(declared)[0], f"{where}[0]") if found else ""
    return where if declared is str and not isinstance(found, str) else ""
