"""The kernel's outbound policies, and which of them decide.

A floor that is the last of the policies is left out: flows that reach it are unprotected, as if no
policy matched. If another policy has its priority or a higher number, the order in the kernel is
unknown, and the floor counts like any other.
"""

from __future__ import annotations

from ipsecgate.core.model.ipsec import SpdEntry, SpdKey
from ipsecgate.core.model.policy import FLOOR_PRIORITY
from ipsecgate.core.state.floor import is_floor
from ipsecgate.core.state.spd_rules import SpdRules


class OutboundPolicies:
    """`by_key`: all of them. `rules`: those of the ones that decide."""

    def __init__(self) -> None:
        self.by_key: dict[SpdKey, SpdEntry] = {}
        self.rules = SpdRules()
        # Policies that are no floor, but have a floor's priority or a higher number.
        self._late: set[SpdKey] = set()

    def put(self, entry: SpdEntry) -> int:
        """Take in a policy; return how many objects differ: none, the new one, and the old one."""
        old = self.by_key.get(entry.key)
        if old == entry:
            return 0
        self.drop(entry.key)
        self.by_key[entry.key] = entry
        if not is_floor(entry):
            self.rules.put(entry)
            if entry.priority >= FLOOR_PRIORITY:
                self._late.add(entry.key)
                if len(self._late) == 1:
                    self._judge_floor()
        elif self._late:
            self.rules.put(entry)
        return 1 + (old is not None)

    def drop(self, key: SpdKey) -> None:
        """Forget a policy."""
        if self.by_key.pop(key, None) is not None:
            self.rules.remove(key)
            if key in self._late:
                self._late.remove(key)
                if not self._late:
                    self._judge_floor()

    def _judge_floor(self) -> None:
        for entry in self.by_key.values():
            if is_floor(entry):
                if self._late:
                    self.rules.put(entry)
                else:
                    self.rules.remove(entry.key)
