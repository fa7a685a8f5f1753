"""The verbs: their groups in `--help`, and the module of each, which is imported when it runs."""

from __future__ import annotations

from importlib import import_module
from typing import ClassVar

import click
from click.shell_completion import CompletionItem

from ipsecgate.cli.root import only_root
from ipsecgate.cli.verb import Examples
from ipsecgate.errors import UsageError
from ipsecgate.printable import printable

# Group -> verb -> its module in this package, and the first line of its help.
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Look": {
        "status": ("status", "Show what is gated, what is refused and why, and what to do."),
        "why": ("why", "Explain why a flow is allowed or refused."),
        "events": ("events", "Show what was refused or blocked, and why."),
        "check": ("check", "Check what is missing or does not fit, and say what to do."),
        "top": ("top", "Watch what is refused, negotiating, covered and held, live."),
        "policies": ("nouns", "Show the policies in force, and whether an SA covers them."),
        "sas": ("nouns", "Show the live outbound SAs."),
        "flows": ("nouns", "Show the flows of gated processes."),
        "cgroups": ("nouns", "Show the gated cgroups."),
        "holds": ("nouns", "Show the held calls, and what each waits for."),
    },
    "Wait for SAs": {
        "wait": ("wait", "Wait until live SAs protect flows or policies."),
        "up": ("wait", "Negotiate what a policy or a child needs, and wait for it."),
        "down": ("wait", "End the CHILD_SAs of a policy or a child."),
        "unit-dropin": (
            "unit_dropin",
            "Print a systemd drop-in that delays a service until its peers are protected.",
        ),
    },
    "Run something gated": {
        "exec": ("exec", "Run COMMAND gated, and hold its calls until an SA protects them."),
        "seccomp-profile": (
            "profile",
            "Print a seccomp profile that makes the gate hold a container's calls.",
        ),
    },
    "Set up the gate": {
        "attach": ("pins", "Gate a cgroup and all cgroups below it."),
        "detach": ("pins", "Stop gating a cgroup."),
        "run": ("run", "Run the controller in the foreground."),
        "reload": ("run", "Make the controller read its configuration again."),
        "load": ("pins", "Pin the hooks and their maps."),
        "unload": ("pins", "Remove the hooks and their maps, which opens the gate."),
    },
    "Monitoring, support": {
        "metrics": ("metrics", "Print the gate's metrics for Prometheus, or serve them."),
        "schema": ("schema", "Print the JSON schema of a document that --json prints."),
        "bugtool": ("bugtool", "Collect a support bundle without secrets."),
        "demo": ("demo", "Compare first connections with and without the gate."),
    },
}
ENVIRONMENT = (
    ("IPSECGATE_CONFIG", "The option --config."),
    ("IPSECGATE_INSTANCE", "The option --instance."),
    ("IPSECGATE_BPFFS", "The folder to use in place of /sys/fs/bpf."),
    ("IPSECGATE_RUN_DIR", "The folder to use in place of /run/ipsecgate."),
    ("IPSECGATE_CACHE_DIR", "The folder to use in place of /var/cache/ipsecgate."),
)


class Verbs(Examples, click.Group):
    """The verbs. Each one's module is imported when it runs: `exec` must start quickly."""

    verbs: ClassVar = {name: entry for group in GROUPS.values() for name, entry in group.items()}

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the verbs in the order of `--help`."""
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Import a verb; None: there is none of this name."""
        if cmd_name not in self.verbs:
            return None
        module = import_module(f"ipsecgate.cli.{self.verbs[cmd_name][0]}")
        # A verb that is also a Python built-in, such as exec, is named with an underscore.
        name = cmd_name.replace("-", "_")
        command: click.Command = getattr(module, name, None) or getattr(module, f"{name}_")
        return only_root(command, cmd_name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the verb. Raises: UsageError, which names those that are spelled alike."""
        name = args[0]
        if name in self.verbs or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        from difflib import get_close_matches  # noqa: PLC0415 - seldom used

        alike = " or ".join(
            f"`ipsecgate {one}`" for one in get_close_matches(name, self.verbs, 2, 0.7)
        )
        hint = "`ipsecgate --help` lists the verbs"
        raise UsageError(
            f"there is no verb {printable(name)}",
            hint=f"did you mean {alike}? {hint}" if alike else hint,
        )

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer the verbs without importing them, and the global options."""
        verbs = [
            CompletionItem(name, help=summary)
            for name, (_, summary) in self.verbs.items()
            if name.startswith(incomplete)
        ]
        return [*verbs, *click.Command.shell_complete(self, ctx, incomplete)]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the verbs before the options."""
        self.format_commands(ctx, formatter)
        click.Command.format_options(self, ctx, formatter)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """List the verbs by group, without importing them."""
        width = max(map(len, self.verbs))
        for title, group in GROUPS.items():
            with formatter.section(title):
                rows = [(f"{name:{width}}", summary) for name, (_, summary) in group.items()]
                formatter.write_dl(rows)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples, and the environment variables at the end."""
        super().format_epilog(ctx, formatter)
        with formatter.section("Environment"):
            formatter.write_dl(ENVIRONMENT)
