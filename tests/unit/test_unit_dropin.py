"""The drop-in that `ipsecgate unit-dropin` makes: few lines, and the right command is held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ipsecgate.admin import unit_dropin
from ipsecgate.admin.unit_dropin import Unit, install, is_gated, name_of, starts, text_of, unit_of
from ipsecgate.edges.host.config import Config
from ipsecgate.errors import UsageError

DB = Unit("db.service", starts=("/usr/bin/db --port 5432",))
GATED = Config(cgroups=("unit:db",))

CAT = r"""# /lib/systemd/system/db.service
[Unit]
Description=ExecStart=no
[Service]
ExecStart=/usr/bin/old
ExecStart=
ExecStart=/usr/bin/db --port \
    5432
ExecStartPre=/bin/true

# /etc/systemd/system/db.service.d/ipsecgate.conf
[Service]
ExecStart=
ExecStart=/usr/bin/ipsecgate exec --cgroup unit:db -- /usr/bin/db

# /etc/systemd/system/db.service.d/more.conf
[Service]
ExecStart=-/usr/bin/second
"""


def settings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def test_a_gated_service_needs_two_settings() -> None:
    text = text_of(DB, GATED, hold=False)
    assert settings(text) == [
        "[Unit]", "Requires=ipsecgate-online.target", "After=ipsecgate-online.target",
    ]  # fmt: skip
    assert "The configuration gates db.service" in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_without_a_configuration_it_says_that_it_does_not_know() -> None:
    assert "not known whether db.service is gated" in text_of(DB, None, hold=False)
    with pytest.raises(UsageError, match="not known whether"):
        text_of(DB, None, hold=True)


def test_a_service_that_is_not_gated_is_told_how_to_be() -> None:
    text = text_of(DB, Config(), hold=False)
    assert '#     cgroups = ["unit:db"]' in text
    assert settings(text) == settings(text_of(DB, GATED, hold=False))
    with pytest.raises(UsageError, match="not gated, so its calls cannot be held"):
        text_of(DB, Config(), hold=True)


@pytest.mark.parametrize(
    ("config", "gated"),
    [
        (Config(cgroups=("unit:db",)), True),
        (Config(cgroups=("unit:db.service",)), True),
        (Config(cgroups=("unit:dbx",)), False),
        (Config(host=True), True),
        (Config(cgroups=("/sys/fs/cgroup/system.slice",)), True),
        (Config(cgroups=("/sys/fs/cgroup/a.slice/a-b.slice",)), False),
        (Config(cgroups=("container:db",)), False),
    ],
)
def test_whether_the_configuration_gates_it(config: Config, gated: bool) -> None:
    assert is_gated(DB, config) is gated


def test_a_slice_gates_those_within() -> None:
    inside = Unit("db.service", "a-b.slice")
    for path, gated in (("a.slice", True), ("a.slice/a-b.slice", True), ("b.slice", False)):
        assert is_gated(inside, Config(cgroups=(f"/sys/fs/cgroup/{path}",))) is gated


def test_the_command_is_the_units_own() -> None:
    assert starts(CAT) == ["/usr/bin/db --port 5432", "-/usr/bin/second"]
    unit = Unit("db.service", starts=tuple(starts(CAT)))
    holder = "/usr/bin/ipsecgate exec --cgroup unit:db"
    assert settings(text_of(unit, GATED, hold=True))[3:] == [
        "[Service]",
        "ExecStart=",
        f"ExecStart={holder} -- /usr/bin/db --port 5432",
        f"ExecStart=-{holder} -- /usr/bin/second",
    ]
    unit = Unit("db.service", user="postgres", starts=("-/usr/bin/db $ARGS",))
    assert settings(text_of(unit, GATED, hold=True))[-1] == (
        f"ExecStart=-!{holder} --user postgres -- /usr/bin/db $ARGS"
    )


@pytest.mark.parametrize(
    ("unit", "said"),
    [
        (Unit("db.service"), "has no ExecStart="),
        (Unit("db.service", starts=("+/usr/bin/db",)), "special prefix"),
        (Unit("db.service", starts=("@/usr/bin/db db",)), "special prefix"),
        (
            Unit("db.service", user="db", starts=("/usr/bin/db",), lost=("AmbientCapabilities",)),
            "AmbientCapabilities= would be lost",
        ),
    ],
)
def test_what_cannot_be_held_is_refused(unit: Unit, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        text_of(unit, GATED, hold=True)


def test_names() -> None:
    for written, name in (
        ("db", "db.service"),
        ("db.service", "db.service"),
        ("postgresql@16-main", "postgresql@16-main.service"),
        (r"a\x2db", r"a\x2db.service"),
    ):
        assert name_of(written) == name
    for written in ("", "../x", "a b", "a/b", "x.service/y", "x\ny"):
        with pytest.raises(UsageError):
            name_of(written)


Systemctl = Callable[..., str]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Systemctl answers as for a service with a user and a capability; return what it is asked."""
    words_seen: list[tuple[str, ...]] = []

    def systemctl(*words: str) -> str:
        words_seen.append(words)
        shown = "Slice=a-b.slice\nUser=db\nDynamicUser=no\nGroup=\nAmbientCapabilities=cap_chown\n"
        return {"cat": CAT, "show": shown}.get(words[0], "")

    monkeypatch.setattr(unit_dropin, "_systemctl", systemctl)
    return words_seen


def test_what_systemd_says_of_it(asked: list[tuple[str, ...]]) -> None:
    unit = unit_of("db.service")
    assert (unit.slice, unit.user, unit.lost) == ("a-b.slice", "db", ("AmbientCapabilities",))
    assert unit.starts == ("/usr/bin/db --port 5432", "-/usr/bin/second")


def test_it_is_installed_and_read(asked: list[tuple[str, ...]], tmp_path: Path) -> None:
    for text in ("[Unit]\n", "[Unit]\n# again\n"):
        path = install(DB, text, tmp_path)
        assert path == tmp_path / "db.service.d/ipsecgate.conf"
        assert path.read_text() == text
        assert path.stat().st_mode & 0o777 == 0o644
        assert [entry.name for entry in path.parent.iterdir()] == ["ipsecgate.conf"]
    assert asked == [("daemon-reload",)] * 2
