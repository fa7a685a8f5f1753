"""bugtool: what someone who helps needs to know about this machine, without secrets."""

from __future__ import annotations

import io
import os
import socket
import tarfile
import time
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path

import click

from ipsecgate.admin import bundle
from ipsecgate.admin.bundle import Collected
from ipsecgate.cli.app import App, cli
from ipsecgate.cli.verb import verb
from ipsecgate.errors import GateError, UsageError
from ipsecgate.printable import as_json, printable

ARCHIVES = (".tar.gz", ".tgz")
# Verbs whose document goes into the bundle; one that this version lacks is left out.
VERBS = ("status", "check", "why", "events", "policies", "sas", "flows", "cgroups", "holds")


@verb(
    examples=[
        ("ipsecgate bugtool", "Write a bundle into the current folder."),
        ("ipsecgate bugtool --output /tmp/gate.tar.gz", "Write it to this file."),
        ("ipsecgate bugtool --output /tmp/gate/", "Write it as files, to look through them."),
    ]
)
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Write to this file (.tar.gz or .tgz) or to this new folder.",
)
@click.pass_obj
def bugtool(app: App, output: Path | None) -> None:
    """Collect a support bundle without secrets.

    It has what `ipsecgate status`, `why`, `events` and `check` print, the configuration,
    strongSwan's connections and SAs, SAs and policies of the kernel, routes, rules, BPF
    programs, and the log of ipsecgate's units. It has no keys. It does have addresses, and
    names of processes, cgroups and connections: look through it before you publish it.

    What cannot be read is named at the end and in manifest.json. Only root can read it all.
    """
    made = output or Path(
        f"ipsecgate-{socket.gethostname()}-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz"
    )
    if made.exists():
        raise UsageError(f"{made} exists already", hint="name a new file or folder with --output")
    collected = list(bundle.collect([*_documents(app), *bundle.items(app.paths, _vici(app))]))
    manifest = bundle.manifest(app.paths, collected)
    files = [*collected, Collected("manifest.json", as_json(manifest, indent=1), 0)]
    (_write_archive if made.name.endswith(ARCHIVES) else _write_folder)(made, files)
    app.done(*_summary(made.absolute(), collected), output=str(made.absolute()), **manifest)


def _vici(app: App) -> Path:
    try:
        return app.config().vici
    except GateError:
        from ipsecgate.edges.host.config import DEFAULT_VICI  # noqa: PLC0415

        return DEFAULT_VICI


def _documents(app: App) -> Iterator[bundle.Item]:
    """Yield what our own verbs print with --json."""
    for name in VERBS:
        if name in cli.verbs:
            yield f"{name}.json", lambda name=name: _document(app, name)  # type: ignore[misc]


def _document(app: App, name: str) -> str:
    """Return the document of a verb. Raises: GateError, OSError."""
    command = cli.get_command(click.Context(cli), name)
    if command is None:
        raise GateError(f"there is no verb {name}")
    out = io.StringIO()
    quiet = App(app.paths, app.config_required, json=True, verbose=False)
    with redirect_stdout(out):
        # Its exit code may say that all is not well.
        command.main([], prog_name=name, standalone_mode=False, obj=quiet)
    return out.getvalue()


def _summary(made: Path, collected: Sequence[Collected]) -> Iterator[str]:
    failed: dict[str, list[str]] = {}  # error -> names
    for item in collected:
        if item.error:
            failed.setdefault(item.error, []).append(item.name)
    complete = sum(not item.error for item in collected)
    hidden = sum(item.hidden for item in collected)
    yield f"{made}: {complete} of {len(collected)} items, readable by you only"
    for error, names in failed.items():
        yield f"  not complete: {', '.join(names)}: {printable(error)}"
    if hidden:
        yield f"  hidden: {hidden} {'text' if hidden == 1 else 'texts'} that may be secret"
    yield f"  left out: {'; '.join(bundle.LEFT_OUT)}"
    yield "  It has addresses and names: look through it before you publish it."


def _write_archive(path: Path, files: Sequence[Collected]) -> None:
    """Write a compressed archive. Raises: OSError."""
    folder = path.name.partition(".")[0]
    with (
        os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as raw,
        tarfile.open(fileobj=raw, mode="w:gz") as archive,
    ):
        for item in files:
            data = item.text.encode(errors="replace")
            info = tarfile.TarInfo(f"{folder}/{item.name}")
            info.size, info.mtime, info.mode = len(data), int(time.time()), 0o600
            archive.addfile(info, io.BytesIO(data))


def _write_folder(path: Path, files: Sequence[Collected]) -> None:
    """Write a folder. Raises: OSError."""
    path.mkdir(mode=0o700)
    for item in files:
        file = path / item.name
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.write_bytes(item.text.encode(errors="replace"))
