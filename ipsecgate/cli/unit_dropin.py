"""unit-dropin: have a service start only when its peers are protected."""

from __future__ import annotations

import click

from ipsecgate.admin import unit_dropin as dropins
from ipsecgate.cli import complete
from ipsecgate.cli.app import App
from ipsecgate.cli.verb import verb
from ipsecgate.errors import UsageError
from ipsecgate.printable import printable


@verb(
    examples=[
        ("ipsecgate unit-dropin webshop", "Print the drop-in for a service."),
        ("ipsecgate unit-dropin kubelet --install", "Install it and reload systemd."),
        ("ipsecgate unit-dropin web --hold", "Also hold its calls whenever there is no SA."),
    ]
)
@click.argument("name", shell_complete=complete.units)
@click.option("--hold", is_flag=True, help="Run the service's command under `ipsecgate exec`.")
@click.option(
    "--install", is_flag=True, help="Write it below /etc/systemd/system; it restarts nothing."
)
@click.pass_obj
def unit_dropin(app: App, *, name: str, hold: bool, install: bool) -> None:
    """Print a systemd drop-in that delays a service until its peers are protected.

    The service then starts after ipsecgate-online.target: when live SAs protect everything
    that the policies protect. The comments in the drop-in explain each line, and say whether
    the service is gated.
    """
    unit = dropins.unit_of(dropins.name_of(name))
    try:
        config = app.config()
    except UsageError:
        config = None
    text = dropins.text_of(unit, config, hold=hold)
    if not install:
        if app.json:
            app.document({"unit": unit.name, "text": text})
            return
        for line in text.splitlines():  # of a file, so they are not wrapped
            app.out.print(printable(line), soft_wrap=True)
        return
    path = dropins.install(unit, text)
    app.done(
        f"installed: {path}",
        f"in force from the next start: `systemctl restart {unit.name}`",
        unit=unit.name,
        installed=str(path),
    )
