"""--version: the versions of everything that a decision of the gate depends on."""

from __future__ import annotations

from ipsecgate.admin.versions import LIBRARIES, versions
from ipsecgate.cli.app import App
from ipsecgate.edges.host.config import DEFAULT_VICI
from ipsecgate.errors import GateError


def show(app: App) -> None:
    """Print the versions, also if the configuration is broken."""
    try:
        vici = app.config().vici
    except GateError:
        vici = DEFAULT_VICI
    found = versions(vici)
    app.done(
        f"ipsecgate {found['ipsecgate']}",
        f"Linux {found['kernel']}",
        f"strongSwan: {found['strongswan'] or f'does not answer on {vici}'}",
        f"BCC {found['bcc'] or 'is not installed'}, Python {found['python']}",
        ", ".join(f"{name} {found[name] or 'of unknown version'}" for name in LIBRARIES),
        **found,
    )
