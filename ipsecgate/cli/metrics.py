"""metrics: the gate's metrics for Prometheus, once or as a server."""

from __future__ import annotations

import logging
import os
import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import click

from ipsecgate.admin.status import status_of
from ipsecgate.cli.app import App
from ipsecgate.cli.verb import verb
from ipsecgate.edges.host import systemd
from ipsecgate.edges.host.config import DEFAULT_LISTEN
from ipsecgate.edges.host.listen import Listen
from ipsecgate.errors import UsageError

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

log = logging.getLogger("ipsecgate")

CONFIGURED = "as configured"


@verb(
    examples=[
        ("ipsecgate metrics", "Print them once."),
        (
            "ipsecgate metrics --output /var/lib/prometheus/node-exporter/ipsecgate.prom",
            "Write them for node_exporter.",
        ),
        ("ipsecgate metrics --listen 127.0.0.1:9765", "Serve them."),
    ],
)
@click.option(
    "--listen",
    is_flag=False,
    flag_value=CONFIGURED,
    metavar="[ADDRESS]",
    help="Serve them over HTTP on ADDRESS:PORT or unix:PATH; without a value on metrics.listen of "
    f"the configuration, or on {DEFAULT_LISTEN}.",
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write them to FILE, which is replaced atomically.",
)
@click.pass_obj
def metrics(app: App, listen: str | None, output: Path | None) -> None:
    """Print the gate's metrics for Prometheus, or serve them.

    It is a process of its own that reads what `ipsecgate status` reads. Without a controller
    it goes on, and ipsecgate_controller_up is 0. With --output, node_exporter's textfile
    collector can read the metrics.
    """
    if listen is not None and output is not None:
        raise UsageError("use only one of --listen and --output")
    # 70 ms, so not when the arguments are wrong.
    from prometheus_client import generate_latest, write_to_textfile  # noqa: PLC0415

    from ipsecgate.monitor.metrics import registry  # noqa: PLC0415

    found = registry(partial(status_of, app.paths, app.config))
    if listen is not None:
        _serve(_address(app, listen), found)
    elif output is not None:
        os.umask(0o022)  # another user's node_exporter reads it
        write_to_textfile(str(output), found)
    else:
        sys.stdout.write(generate_latest(found).decode())


def _address(app: App, text: str) -> Listen:
    if text == CONFIGURED:
        return app.config().listen or DEFAULT_LISTEN
    try:
        return Listen.parse(text)
    except ValueError as error:
        raise UsageError(
            f"--listen: {error}",
            hint=f"for example {DEFAULT_LISTEN} or unix:{app.paths.run}/metrics.sock",
        ) from error


def _serve(where: Listen, found: CollectorRegistry) -> None:
    from ipsecgate.monitor import exporter  # noqa: PLC0415

    signal.signal(signal.SIGTERM, _stop)
    with exporter.listening(where, found) as server:
        systemd.notify(READY=1)
        log.info("serving metrics on %s", where)
        server.serve_forever()


def _stop(*_: object) -> NoReturn:
    sys.exit(0)
