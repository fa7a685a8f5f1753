"""A configuration file is read completely, or refused with the file and the key."""

from __future__ import annotations

import re
from dataclasses import replace
from errno import EACCES, EHOSTUNREACH
from ipaddress import ip_network
from pathlib import Path

import pytest

from ipsecgate.cli.config_reference import EXAMPLE
from ipsecgate.core.model.flow import TCP
from ipsecgate.core.model.ipsec import Action
from ipsecgate.core.model.policy import SaSource
from ipsecgate.core.tables import rule_table
from ipsecgate.edges.host import config
from ipsecgate.edges.host.config import Config, load
from ipsecgate.edges.host.config_keys import SECTIONS, toml
from ipsecgate.errors import UsageError

WHOLE = """
[gate]
mode = "audit"
default = "deny"
cgroups = ["unit:postgresql"]
vici = "/run/other.vici"
sa_source = "vici"
[errno]
uncovered = "EACCES"
[[policy]]
name = "db"
remote = ["10.2.0.0/16", "2001:db8:2::/48"]
protocol = "tcp"
port = "5432-5440"
child = "net-net"
initiate = "start"
[[policy]]
name = "printer"
remote = ["10.2.9.9/32"]
action = "bypass"
"""


def test_every_setting_is_read(tmp_path: Path) -> None:
    file = tmp_path / "ipsecgate.toml"
    file.write_text(WHOLE)
    config = load(file)
    assert (config.settings.audit, config.settings.deny) == (True, True)
    assert config.cgroups == ("unit:postgresql",)
    assert config.vici == Path("/run/other.vici")
    assert config.settings.sa_source is SaSource.VICI
    assert config.settings.errnos.uncovered == EACCES
    assert config.settings.errnos.failed == EHOSTUNREACH
    db, printer = config.settings.policies
    assert (db.name, db.proto, db.ports, db.child, db.start) == (
        "db", TCP, (5432, 5440), "net-net", True,
    )  # fmt: skip
    assert db.remote == (ip_network("10.2.0.0/16"), ip_network("2001:db8:2::/48"))
    assert printer.action is Action.BYPASS


@pytest.mark.parametrize(
    ("gate", "floor"),
    [
        ("host = true", True), ('host = true\nfloor = "none"', False), ("", False),
        ('floor = "xfrm-block"', True),
    ],
)  # fmt: skip
def test_the_floor_belongs_to_a_gated_host_unless_it_is_turned_off(
    tmp_path: Path, gate: str, floor: bool
) -> None:
    file = tmp_path / "ipsecgate.toml"
    file.write_text(f"[gate]\n{gate}\n")
    assert load(file).settings.floor is floor


def test_files_in_policies_d_are_read_in_order(tmp_path: Path) -> None:
    (tmp_path / "policies.d").mkdir()
    for name in ("b", "a"):
        (tmp_path / f"policies.d/{name}.toml").write_text(
            f'[[policy]]\nname = "{name}"\nremote = ["10.0.0.0/8"]\n'
        )
    file = tmp_path / "ipsecgate.toml"
    file.write_text('[[policy]]\nname = "first"\nremote = ["10.0.0.0/8"]\n')
    assert [p.name for p in load(file).settings.policies] == ["first", "a", "b"]


def test_a_missing_file_means_the_defaults_unless_it_is_required(tmp_path: Path) -> None:
    missing = tmp_path / "none.toml"
    assert load(missing, required=False) == Config()
    with pytest.raises(UsageError, match=r"none\.toml: No such file"):
        load(missing)


@pytest.mark.parametrize(
    "text",
    [
        f"a = {'[' * 3000}",
        f"a = {'9' * 5000}",
        f"gate{'.a' * 3000} = 1",
        f"[[policy]]\nname{'.a' * 3000} = 1",
        "a = \ud800",
    ],
    ids=["nested", "long number", "deep table", "deep value", "no character"],
)
def test_text_that_breaks_the_toml_parser_is_reported_with_the_file(
    tmp_path: Path, text: str
) -> None:
    file = tmp_path / "ipsecgate.toml"
    file.write_bytes(text.encode(errors="surrogatepass"))
    with pytest.raises(UsageError, match=r"ipsecgate\.toml: "):
        load(file)


@pytest.mark.parametrize("key", ["vici = ", "cgroups = "])
def test_a_path_with_a_nul_byte_is_refused(tmp_path: Path, key: str) -> None:
    file = tmp_path / "ipsecgate.toml"
    value = '"/run/a\\u0000b"'
    file.write_text(f"[gate]\n{key}{value if 'vici' in key else f'[{value}]'}\n")
    with pytest.raises(UsageError, match=key.split(maxsplit=1)[0]):
        load(file)


def policy(lines: str) -> str:
    return f'[[policy]]\nname = "x"\nremote = ["10.0.0.0/8"]\n{lines}'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[gate]\nmood = 1", r"c\.toml: gate\.mood: unknown key"),
        ("[gait]", r"c\.toml: gait: unknown key"),
        ("[gate]\nmode = 'loud'", r"gate\.mode: 'loud' is not one of enforce, audit"),
        ("[gate]\nsa_source = 'esp'", r"gate\.sa_source: 'esp' is not one of auto, xfrm, vici"),
        ("[gate]\nhost = 'yes'", r"gate\.host: must be true or false"),
        ("[gate]\ncgroups = [1]", r"gate\.cgroups: must be a list of strings, but contains 1"),
        ("[gate]\nhost = true\ncgroups = ['/x']", r"gate\.cgroups: cannot be combined"),
        ("gate = 3", r"gate: must be a table, not 3"),
        ("[gate]\nmode = ?", r"c\.toml: not valid TOML: .*line 2"),
        ("[errno]\nuncovered = 'EINTR'", r"errno\.uncovered: 'EINTR' is not one of"),
        (policy("remot = 1"), r"policy\[1\]\.remot: unknown key"),
        (policy("action = 'allow'"), r"policy\[1\]\.action: 'allow' is not one of"),
        (policy("port = '80'"), r"policy\[1\]\.port: needs protocol"),
        (policy("protocol = 'tcp'\nport = '0'"), r"policy\[1\]\.port: '0' is not within"),
        (policy("protocol = 'tcp'\nport = '9-3'"), r"policy\[1\]\.port: '9-3' is an empty range"),
        (policy("protocol = 'tcp'\nport = 'http'"), r"policy\[1\]\.port: 'http' is not a port"),
        (
            policy("action = 'discard'\nchild = 'c'"),
            r"policy\[1\]\.child: has no effect with action",
        ),
        ("[[policy]]\nname = 'x'", r"policy\[1\]\.remote: missing"),
        (
            "[[policy]]\nname = 'x'\nremote = ['10.0.0.1/8']",
            r"remote: .*host bits set: write '10\.0\.0\.0/8'",
        ),
        (
            "[[policy]]\nname = 'x'\nremote = ['ten']",
            r"policy\[1\]\.remote: 'ten' is not an IPv4 or",
        ),
        ("[[policy]]\nremote = ['10.0.0.0/8']", r"policy\[1\]\.name: missing"),
        (
            policy("") + policy(""),
            r"policy\[2\]\.name: 'x' is already the name of policy\[1\] in .*c\.toml",
        ),
    ],
)
def test_an_invalid_value_is_reported_with_file_and_key(
    tmp_path: Path, text: str, message: str
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(UsageError, match=message) as caught:
        load(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert caught.value.hint


@pytest.mark.parametrize(
    ("section", "key"), [(name, key) for name, section in SECTIONS.items() for key in section.keys]
)
def test_the_example_of_each_key_is_valid(tmp_path: Path, section: str, key: str) -> None:
    lines = (
        {"name": 'name = "x"', "remote": 'remote = ["10.0.0.0/8"]'} if section == "policy" else {}
    )
    if key == "port":
        lines["protocol"] = 'protocol = "tcp"'
    lines[key] = SECTIONS[section].keys[key].hint.removeprefix("for example: ")
    (tmp_path / "c.toml").write_text("\n".join([SECTIONS[section].heading, *lines.values()]))
    load(tmp_path / "c.toml")


def test_the_default_of_each_key_is_what_a_missing_key_means(tmp_path: Path) -> None:
    needed = '[[policy]]\nname = "x"\nremote = ["10.0.0.0/8"]\n'
    (tmp_path / "without.toml").write_text(needed)
    written = [
        [
            each.heading,
            *(f"{k.name} = {toml(k.default)}" for k in each.keys.values() if not k.required),
        ]
        for each in reversed(list(SECTIONS.values()))
    ]
    lines = "\n".join("\n".join(section) for section in written).removeprefix("[[policy]]")
    (tmp_path / "with.toml").write_text(needed + lines)
    assert load(tmp_path / "with.toml") == load(tmp_path / "without.toml")
    (tmp_path / "empty.toml").write_text("")
    assert load(tmp_path / "empty.toml") == Config()


def test_an_ipv4_mapped_network_becomes_its_ipv4_network(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(policy("").replace("10.0.0.0/8", "::ffff:10.0.0.0/104"))
    assert load(file).settings.policies[0].remote == (ip_network("10.0.0.0/8"),)


def test_policies_that_exceed_the_hook_table_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "c.toml"
    file.write_text(policy('protocol = "tcp"\nport = "1-65534"\n'))
    load(file)
    monkeypatch.setattr(config, "ENTRY_LIMIT", rule_table.COARSE_ENTRIES + 29)
    with pytest.raises(UsageError, match=r"c\.toml: policy: 15 distinct masks and 30 entries"):
        load(file)


def test_a_misspelled_key_gets_a_suggestion(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(policy("acton = 'bypass'"))
    with pytest.raises(UsageError) as caught:
        load(file)
    assert caught.value.hint == "did you mean 'action'?"


def test_an_unreadable_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.toml").mkdir()
    with pytest.raises(UsageError, match=r"c\.toml: Is a directory"):
        load(tmp_path / "c.toml")
    (tmp_path / "d.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"d\.toml: not UTF-8"):
        load(tmp_path / "d.toml")


def readme() -> str:
    text = (Path(__file__).parents[2] / "README.md").read_text()
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.S)
    return str(example)


@pytest.mark.parametrize("example", [readme(), EXAMPLE], ids=["README.md", "man page"])
def test_the_examples_in_the_docs_are_valid_and_show_the_defaults(
    example: str, tmp_path: Path
) -> None:
    (tmp_path / "c.toml").write_text(example)
    config, default = load(tmp_path / "c.toml"), Config()
    assert config.settings.policies[-1].name == "db"
    assert replace(config.settings, policies=()) == default.settings
    assert (config.vici, config.host) == (default.vici, default.host)


@pytest.mark.parametrize("text", ["[::1]:9765", "unix:/run/ipsecgate/metrics.sock"])
def test_where_metrics_are_served(tmp_path: Path, text: str) -> None:
    file = tmp_path / "ipsecgate.toml"
    file.write_text(f"[metrics]\nlisten = {text!r}\n")
    assert str(load(file).listen) == text
    file.write_text("[gate]\n")
    assert load(file).listen is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("listen = 'localhost:9765'", "metrics.listen: 'localhost:9765' is neither"),
        ("listen = 9765", "metrics.listen: must be a string"),
        ("lisen = '127.0.0.1:9765'", "metrics.lisen: unknown key"),
    ],
)
def test_a_wrong_address_for_metrics_is_named(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "ipsecgate.toml"
    file.write_text(f"[metrics]\n{text}\n")
    with pytest.raises(UsageError, match=re.escape(message)):
        load(file)
