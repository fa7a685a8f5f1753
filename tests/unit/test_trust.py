"""Which files and folders root trusts, and what programs inherit. Some tests need root."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ipsecgate import trust
from ipsecgate.edges.bpf import bytecode, pins
from ipsecgate.edges.host import config, saved_state
from ipsecgate.errors import UsageError
from ipsecgate.lock import held

STRANGER = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("[]")
    path.chmod(0o600)
    return path


def test_a_trusted_file_is_read_unchanged(file: Path) -> None:
    file.write_bytes("ö\r\n".encode())
    assert trust.read(file) == "ö\r\n"


@pytest.mark.parametrize("mode", [0o602, 0o622, 0o666])
def test_a_file_that_others_may_write_is_refused(file: Path, mode: int) -> None:
    file.chmod(mode)
    with pytest.raises(trust.UntrustedError, match="not trusted") as caught:
        trust.read(file)
    assert "chown root:root" in caught.value.hint
    file.chmod(0o644)
    trust.read(file)


@as_root
@pytest.mark.parametrize(("owner", "group", "mode"), [(STRANGER, 0, 0o600), (0, STRANGER, 0o660)])
def test_a_file_that_another_user_owns_is_refused(
    file: Path, owner: int, group: int, mode: int
) -> None:
    file.chmod(mode)
    os.chown(file, owner, group)
    with pytest.raises(trust.UntrustedError, match=f"user {owner} and group {group}"):
        trust.read(file)


def test_links_fifos_and_folders_are_refused_as_files(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(file)
    with pytest.raises(OSError, match="symbolic links"):
        trust.read(link)
    assert trust.read(link, follow=True) == "[]"
    os.mkfifo(tmp_path / "fifo")  # opening it would wait for a writer
    with pytest.raises(trust.UntrustedError):
        trust.read(tmp_path / "fifo")
    with pytest.raises(IsADirectoryError):
        trust.read(tmp_path)


def test_a_folder_is_created_with_its_parents(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        made = trust.folder(tmp_path / "a/b", 0o700)
    finally:
        os.umask(old)
    assert made.stat().st_mode & 0o777 == 0o700
    assert made.parent.stat().st_mode & 0o777 == 0o700
    assert trust.folder(made) == made


def test_a_folder_that_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(trust.UntrustedError, match="drwxrwxrwx"):
        trust.folder(tmp_path / "open")


@as_root
def test_another_users_link_to_a_trusted_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("ours")
    assert trust.folder(tmp_path / "link").resolve() == tmp_path / "ours"
    os.chown(tmp_path / "link", STRANGER, STRANGER, follow_symlinks=False)
    with pytest.raises(trust.UntrustedError):
        trust.folder(tmp_path / "link")


def test_a_program_inherits_nothing_from_the_callers_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evil = tmp_path / "ip"
    evil.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    evil.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:.:/usr/sbin:/usr/bin")
    for name in ("PYTHONPATH", "TMPDIR", "BCC_KERNEL_MODULES_SOURCE", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.chdir(tmp_path)
    said = trust.run(["sh", "-c", "pwd; env; ip -V"]).stdout
    assert said.startswith("/\n")
    assert str(tmp_path) not in said
    assert "iproute2" in said
    assert not (tmp_path / "ran").exists()


# --- where it is used ------------------------------------------------------------


def test_every_reader_refuses_a_file_that_others_may_write(file: Path, tmp_path: Path) -> None:
    file.chmod(0o666)
    with pytest.raises(trust.UntrustedError):
        saved_state.load_children(file)
    with pytest.raises(trust.UntrustedError):
        saved_state.load_targets(file)
    with pytest.raises(trust.UntrustedError), held(file, wait=False, busy=""):
        pass
    with pytest.raises(UsageError, match="not trusted") as caught:
        config.load(file, required=True)
    assert caught.value.hint
    cached = bytecode.cached(tmp_path)
    cached.write_text("{}")
    cached.chmod(0o666)
    with pytest.raises(trust.UntrustedError):
        bytecode.get(tmp_path)


def test_pins_are_not_made_in_a_folder_that_others_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Anyone who may write to the pin folder could remove the pins and so open the gate."""
    monkeypatch.setattr(pins, "ensure_bpffs", lambda _path: None)
    (tmp_path / "ipsecgate").mkdir()
    (tmp_path / "ipsecgate").chmod(0o777)
    with pytest.raises(trust.UntrustedError):
        pins.Pins(tmp_path, "default").load(bytecode.Bytecode({}, {}))


def test_the_compiler_imports_nothing_from_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working folder has hostile modules with the names that the compiler imports."""
    for name in ("ipsecgate", "bcc", "ctypes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"open('{tmp_path}/ran', 'w')\n")
    (tmp_path / "json.py").write_text(f"open('{tmp_path}/ran', 'w')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "json.py"))
    command = [sys.executable, "-I", "-c", bytecode._COMPILER, str(bytecode._PACKAGE.parent)]
    done = subprocess.run(
        [*command, str(tmp_path / "no sources")], capture_output=True, text=True, check=False
    )
    assert "maps.bpf.c" in done.stderr  # it got as far as the missing sources
    assert not (tmp_path / "ran").exists()
