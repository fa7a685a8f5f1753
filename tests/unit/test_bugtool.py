"""The support bundle: each item fails alone, and what looks like a secret is hidden."""

from __future__ import annotations

import json
import stat
import tarfile
from pathlib import Path

import pytest

from ipsecgate.admin import bundle
from ipsecgate.admin.bundle import Collected, collect
from ipsecgate.admin.scrub import HIDDEN, scrub
from ipsecgate.cli import bugtool, main
from ipsecgate.errors import GateError

KEY = "8f3a27c1d4e5b6978f3a27c1d4e5b697"
PEM = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAKC\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (f"enc cbc(aes) 0x{KEY}\n", f"enc cbc(aes) {HIDDEN}\n"),
        (f"auth-trunc hmac(sha256) 0x{KEY.upper()} 128", f"auth-trunc hmac(sha256) {HIDDEN} 128"),
        ("enc cbc(des) 0x0123456789abcdef", f"enc cbc(des) {HIDDEN}"),
        (f"  {PEM}\n", f"  {HIDDEN}\n"),
        ('secret = "a b c"\nnext', f'secret = "{HIDDEN}"\nnext'),
        ("secret = 0sFpZAZqEN6Ti9sqt4ZP5EWcqx", f"secret = {HIDDEN}"),
        ("ike { 0sFpZAZqEN6Ti9sqt4ZP5EWcqx }", f"ike {{ {HIDDEN} }}"),
        ('{"psk": "x", "port": 1}', f'{{"psk": "{HIDDEN}", "port": 1}}'),
        ("# PASSWORD: hunter2, old", f"# PASSWORD: {HIDDEN}, old"),
        ('{"text": "wrong psk: x"}', f'{{"text": "wrong psk: {HIDDEN}"}}'),
        ("--token=abc --next", f"--token={HIDDEN} --next"),
    ],
)
def test_a_secret_is_hidden(text: str, clean: str) -> None:
    assert scrub(text) == (clean, 1)


@pytest.mark.parametrize(
    "text",
    [
        "proto esp spi 0xc1b2a390(3249709968) reqid 1(0x00000001) mode tunnel",
        "mark 0x2a/0xffffffff",
        f"/sys/fs/cgroup/machine.slice/libpod-{KEY}{KEY}.scope",
        "no keys here: <<Keys hidden>>",
        "tag 6deef7357e7b4530",
        "the key of the policy table",
    ],
)
def test_what_an_operator_needs_stays(text: str) -> None:
    assert scrub(text) == (text, 0)


def test_each_item_fails_alone(tmp_path: Path) -> None:
    def broken() -> str:
        raise GateError("it does not answer", evidence="the beginning")

    found = list(
        collect(
            [
                ("a", lambda: "one"),
                ("b", broken),
                ("c", (tmp_path / "missing").read_text),
                ("d", b"\xff".decode),
                ("e", lambda: bundle._output(("no-such-program",))),
                ("f", lambda: bundle._output(("ls", "/no-such-folder"))),
                ("g", lambda: "password: hunter2"),
            ]
        )
    )
    texts = ["(a traceback)" if "Traceback" in item.text else item.text for item in found]
    assert texts == [
        "one", "the beginning", "", "(a traceback)", "", "", f"password: {HIDDEN}",
    ]  # fmt: skip
    assert [item.error.partition(":")[0] for item in found] == [
        "", "it does not answer", "No such file or directory",
        "UnicodeDecodeError", "no-such-program is not installed",
        "ls", "",
    ]  # fmt: skip
    assert found[-1] == Collected("g", f"password: {HIDDEN}", 1)


def test_a_long_item_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "SIZE_LIMIT", 3)
    assert list(collect([("a", lambda: "12345")])) == [
        Collected("a", "123", 0, "cut off after 3 characters")
    ]


def test_keys_are_never_asked_for() -> None:
    for argv in bundle.PROGRAMS.values():
        assert "state" not in argv or argv[-1] == "nokeys"
        assert argv[0] != "journalctl" or all("unit=ipsecgate" in a for a in argv if "unit" in a)


def run(tmp_path: Path, *words: str) -> int:
    folders = ("--bpffs", tmp_path / "bpf", "--run-dir", tmp_path / "run", "--cache-dir", tmp_path)
    with pytest.raises(SystemExit) as ended:
        main([*map(str, folders), *words])
    return int(ended.value.code or 0)


def test_a_bundle_without_a_gate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bugtool, "VERBS", ("status", "why"))  # `check` compiles the hooks
    config = tmp_path / "c.toml"
    config.write_text('[gate]\nvici = "/no/socket"\n# old psk = hunter2\n')
    archive, folder = tmp_path / "gate.tgz", tmp_path / "gate"
    assert run(tmp_path, "-c", str(config), "bugtool", "-o", str(archive)) == 0
    screen = capsys.readouterr().out
    assert f"{archive}: " in screen
    assert "not complete: status.json: the hooks of instance 'default' are not loaded" in screen
    assert "children.json" not in screen, "without a derived policy there is none"
    assert "hidden: 1 text that" in screen
    assert "left out: the keys of the SAs" in screen
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    with tarfile.open(archive) as opened:
        names = set(opened.getnames())
        text = opened.extractfile("gate/configuration/c.toml")
        assert text is not None
        assert b"hunter2" not in text.read()

    assert run(tmp_path, "-c", str(config), "--json", "bugtool", "-o", str(folder)) == 0
    document = json.loads(capsys.readouterr().out)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    written = {f"gate/{p.relative_to(folder)}" for p in folder.rglob("*") if p.is_file()}
    assert written == names
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest.items() <= document.items()
    by_name = {item["name"]: item for item in manifest["items"]}
    assert by_name["configuration/c.toml"]["hidden"] == 1
    assert by_name["strongswan/stats.txt"]["error"]
    assert {f"gate/{name}" for name in by_name} | {"gate/manifest.json"} == names
    assert run(tmp_path, "-c", str(config), "bugtool", "-o", str(folder)) == 2
    assert "exists already" in capsys.readouterr().err


def test_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.toml"
    config.write_text('[gate]\nvici = "/no/socket"\n')
    for words in (("--json", "--version"), ("--version", "--json")):
        assert run(tmp_path, "-c", str(config), *words) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["strongswan"] is None
        assert {"ipsecgate", "kernel", "python", "bcc", "click"} <= found.keys()
    config.write_text("[gait]")
    assert run(tmp_path, "-c", str(config), "--version") == 0
    assert f"Linux {found['kernel']}\n" in capsys.readouterr().out
    assert run(tmp_path, "--json") == 2
