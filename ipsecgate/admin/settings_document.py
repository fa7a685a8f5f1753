"""A configuration as the controller's answer to `configuration` has it."""

from __future__ import annotations

from collections.abc import Sequence
from errno import errorcode

from ipsecgate.admin.policy_document import policy_document
from ipsecgate.admin.status_document import Configured
from ipsecgate.edges.host.config import Config
from ipsecgate.edges.host.config_keys import SECTIONS


def settings_document(config: Config, targets: Sequence[str]) -> Configured:
    """Return a configuration with its own policies; `targets` are `loader.check_targets`'s."""
    settings = config.settings
    errnos = {key: errorcode[getattr(settings.errnos, key)] for key in SECTIONS["errno"].keys}
    return {
        "policies": [policy_document(policy) for policy in settings.policies],
        "derived": [],
        "mode": "audit" if settings.audit else "enforce",
        "default": "deny" if settings.deny else "allow",
        "cgroups": list(targets),
        "floor": "xfrm-block" if settings.floor else "none",
        "live_flows": "destroy" if settings.destroy else "block",
        "vici": str(config.vici),
        "sa_source": settings.sa_source.value,
        "errno": errnos,
    }
