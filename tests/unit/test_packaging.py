"""The files of the packages agree with the program and with each other."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from ipsecgate.edges.bpf import bytecode
from ipsecgate.edges.host import config

ROOT = Path(__file__).parents[2]
PACKAGING = ROOT / "packaging"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_shipped_configuration_is_the_default() -> None:
    assert config.load(PACKAGING / "ipsecgate.toml") == config.Config()


def test_what_it_shows_in_comments_are_the_defaults_and_a_policy(tmp_path: Path) -> None:
    text = re.sub("(?m)^#(?=[a-z[])", "", (PACKAGING / "ipsecgate.toml").read_text())
    file = tmp_path / "ipsecgate.toml"
    file.write_text(text)
    found = config.load(file)
    assert [policy.name for policy in found.settings.policies] == ["db"]
    file.write_text(text.partition("[[policy]]")[0])
    assert config.load(file) == config.Config()


def test_versions_agree() -> None:
    (first, *_) = (PACKAGING / "debian/changelog").read_text().splitlines()
    assert first.startswith(f"ipsecgate ({PROJECT['project']['version']}-")
    pins = (PACKAGING / "vici.txt").read_text().splitlines()[-1]
    assert pins.partition(" ")[0] in (ROOT / "constraints.txt").read_text().splitlines()
    tools = (PACKAGING / "requirements.txt").read_text().splitlines()
    assert set(PROJECT["build-system"]["requires"]) <= set(tools)


def test_one_maintainer_is_named_everywhere() -> None:
    (one,) = PROJECT["project"]["maintainers"]
    address = f"{one['name']} <{one['email']}>"
    for name in ("changelog", "control", "copyright"):
        found = set(re.findall(r"[\w ]+ <[^>]*@[^>]*>", (PACKAGING / "debian" / name).read_text()))
        assert {each.strip() for each in found} >= {address}, name
    role = (PACKAGING / "ansible/roles/ipsecgate/meta/main.yml").read_text()
    assert f"author: {one['name']}" in role


def test_the_package_builds_with_what_the_program_needs() -> None:
    control = (PACKAGING / "debian/control").read_text()
    for need in PROJECT["project"]["dependencies"]:
        name, _, least = need.partition(">=")
        if name != "vici":  # not in Debian: a part of the package
            assert f" python3-{name} (>= {least})" in control


# --- the bytecode that a package ships ---------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package with one source file, on a host without BCC."""
    folder = tmp_path / "ipsecgate"
    (folder / "_bpf").mkdir(parents=True)
    (folder / "_bpf/gate.bpf.c").write_text("int x;\n")
    monkeypatch.setattr(bytecode, "_PACKAGE", folder)
    monkeypatch.setattr(bytecode, "compiler_version", lambda: "")
    monkeypatch.setattr(bytecode, "compiled", never)
    return folder


def never() -> bytecode.Bytecode:
    raise AssertionError("there is no compiler")


def test_shipped_bytecode_is_used_without_a_compiler_and_never_changed(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = bytecode.Bytecode({"connect4": bytecode.Program(b"8 bytes.", {0: "m"})}, {})
    monkeypatch.setattr(bytecode, "compiled", lambda: code)
    bytecode.ship()
    monkeypatch.setattr(bytecode, "compiled", never)
    (shipped,) = (package / "_bytecode").iterdir()
    shipped.chmod(0o444)
    cache = tmp_path / "cache"
    assert bytecode.find(cache) == shipped
    assert bytecode.get(cache) == code
    assert not cache.exists()


@pytest.mark.parametrize("damage", ["another version", "truncated"])
def test_other_or_damaged_bytecode_is_not_used(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    code = bytecode.Bytecode({}, {})
    monkeypatch.setattr(bytecode, "compiled", lambda: code)
    bytecode.ship()
    monkeypatch.setattr(bytecode, "compiled", never)
    shipped = bytecode.shipped()
    if damage == "truncated":
        shipped.write_text(shipped.read_text()[:-9])
    else:
        (package / "_bpf/gate.bpf.c").write_text("int y;\n")
    with pytest.raises(AssertionError, match="there is no compiler"):
        bytecode.get(tmp_path / "cache")
