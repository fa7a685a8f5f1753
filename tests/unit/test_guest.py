"""The parts of the guest that need no kernel: its command line, its console, the download."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ipsecgate import trust
from ipsecgate.edges.kernel.probe import has_esp
from ipsecgate.errors import GateError
from ipsecgate.lab.console import Output
from ipsecgate.lab.guest import command_file, main, settings_file
from ipsecgate.lab.kernel import PACKAGE, Kernel, default_cache, fetch
from ipsecgate.lab.uml import INIT, ROOT, kernel_arguments, memory_folder

KERNEL = Kernel(Path("/c/usr/bin/linux.uml"), Path("/c d/usr/lib/uml/modules/6.1.176"))
ODD = "two\nlines 'single' \"double\" $HOME `id` \\ ö \t!#"
TELL = "import json, os, sys; print(json.dumps([os.getcwd(), dict(os.environ), sys.argv[1:]]))"


# --- the command -----------------------------------------------------------------


def received(
    argv: list[str], env: dict[str, str], cwd: Path
) -> tuple[str, dict[str, str], list[str]]:
    script = command_file([sys.executable, "-c", TELL, *argv], env, cwd)
    done = subprocess.run(["sh", "-c", script], capture_output=True, check=True)
    where, variables, arguments = json.loads(done.stdout)
    variables.pop("LC_CTYPE", None)  # Python's own, PEP 538
    return where, variables, arguments


def test_a_command_gets_exactly_its_environment_folder_and_arguments(tmp_path: Path) -> None:
    folder = tmp_path / "a 'quoted' folder"
    folder.mkdir()
    env = {"ODD": ODD, "EMPTY": "", "BASH_FUNC_x%%": "() { :; }", "A.B-C": "no shell name"}
    arguments = [ODD, "", "-x", "A=B"]
    assert received(arguments, env, folder) == (str(folder), env, arguments)


text = st.text(st.characters(codec="utf-8", exclude_characters="\0"))


@given(value=text, argument=text)
@settings(max_examples=25, deadline=None)
def test_any_text_survives_in_arguments_and_variables(value: str, argument: str) -> None:
    assert received([argument], {"V": value}, Path("/")) == ("/", {"V": value}, [argument])


def test_a_missing_working_folder_stops_the_command(tmp_path: Path) -> None:
    script = command_file(["true"], {}, tmp_path / "gone")
    assert subprocess.run(["sh", "-c", script], capture_output=True, check=False).returncode == 126


@pytest.mark.parametrize("argv", [[], ["A=B", "true"]])
def test_a_command_that_env_would_misread_is_refused(argv: list[str]) -> None:
    with pytest.raises(ValueError, match="not a command"):
        command_file(argv, {}, Path("/"))


def test_settings_are_shell_assignments() -> None:
    results = Path("/tmp/it's here/$HOME")
    script = settings_file(KERNEL, results, terminal=False)
    script += 'printf "%s|" "$modules" "$release" "$results" "$terminal"'
    said = subprocess.run(["sh", "-euc", script], capture_output=True, text=True, check=True)
    assert said.stdout == f"/c d/usr/lib/uml/modules|6.1.176|{results}|no|"


def test_kernel_arguments_contain_no_blanks_and_end_with_init() -> None:
    words = kernel_arguments(KERNEL, Path("/tmp/w"), 512, 9)
    assert words[0] == str(KERNEL.binary)
    assert {"mem=512M", "con1=null,fd:9", "ro"} < set(words)
    assert words[-4:] == ["init=/bin/sh", "--", "/tmp/w/init", "/tmp/w"]
    assert not [word for word in words if " " in word]


def test_memory_that_does_not_fit_into_shm_is_kept_on_disk(tmp_path: Path) -> None:
    assert memory_folder(1 << 40, tmp_path) == tmp_path


def test_init_is_valid_shell() -> None:
    for part in (ROOT, INIT):
        subprocess.run(["sh", "-n", str(part)], check=True)


# --- the console -----------------------------------------------------------------


def test_output_is_passed_on_line_by_line_and_a_partial_line_only_on_flush() -> None:
    said: list[str] = []
    output = Output(said.append)
    output.feed(b"one\ntw")
    assert said == ["one\n"]
    output.feed("o\n\nd\u00f6".encode()[:-1])
    assert said == ["one\n", "two\n", "\n"]
    output.flush()
    output.feed("\u00f6".encode()[1:] + b"\n\xff")
    output.feed(b"")
    output.flush()
    assert said == ["one\n", "two\n", "\n", "d", "\u00f6\n", "\ufffd"]
    assert output.text == "".join(said)


# --- the download ----------------------------------------------------------------


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend to be x86-64, the machine that Debian has the test kernel for."""
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of stand-ins for apt-get and dpkg, first in PATH; they log to `calls`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin")
    monkeypatch.setitem(trust.ENVIRONMENT, "PATH", os.environ["PATH"])
    log = f"echo ${{0##*/}} >>{tmp_path}/calls"
    stand_in(folder / "apt-get", f"{log}; sleep 0.1; : >{PACKAGE}_1_amd64.deb")
    unpack = "mkdir -p usr/bin usr/lib/uml/modules/6.1.176; : >usr/bin/linux.uml"
    stand_in(folder / "dpkg", f"{log}; {unpack}")
    return folder


def stand_in(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh -e\n{script}\n")
    path.chmod(0o755)


def calls(tmp_path: Path) -> list[str]:
    return (tmp_path / "calls").read_text().split()


def test_fetch_unpacks_once_and_keeps_no_package(tools: Path, tmp_path: Path) -> None:
    said: list[str] = []
    cache = tmp_path / "cache"
    kernel = fetch(cache, said.append)
    assert kernel.binary == cache / PACKAGE / "usr/bin/linux.uml"
    assert kernel.release == "6.1.176"
    assert fetch(cache, said.append) == kernel
    assert calls(tmp_path) == ["apt-get", "dpkg"]
    assert len(said) == 1
    assert not list(cache.rglob("*.deb"))
    assert {path.name for path in cache.iterdir()} == {".lock", PACKAGE}


def test_a_failed_fetch_leaves_nothing_and_the_next_one_succeeds(
    tools: Path, tmp_path: Path
) -> None:
    good = (tools / "dpkg").read_text()
    stand_in(tools / "dpkg", "mkdir -p usr/bin; echo disk full >&2; exit 2")
    cache = tmp_path / "cache"
    with pytest.raises(GateError, match="disk full") as caught:
        fetch(cache)
    assert caught.value.hint
    assert {path.name for path in cache.iterdir()} == {".lock"}
    (tools / "dpkg").write_text(good)
    assert fetch(cache).binary.is_file()


def test_fetch_removes_the_leftovers_of_a_killed_one(tools: Path, tmp_path: Path) -> None:
    leftover = tmp_path / "cache" / f".{PACKAGE}-abc" / "usr"
    leftover.mkdir(parents=True)
    fetch(tmp_path / "cache")
    assert not leftover.exists()


def test_concurrent_fetches_download_once(tools: Path, tmp_path: Path) -> None:
    threads = [threading.Thread(target=fetch, args=(tmp_path / "cache",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls(tmp_path) == ["apt-get", "dpkg"]


def test_a_fetch_error_carries_a_hint(tools: Path, tmp_path: Path) -> None:
    stand_in(tools / "apt-get", "echo 'E: Unable to locate package' >&2; exit 100")
    with pytest.raises(GateError, match="Unable to locate package") as caught:
        fetch(tmp_path / "cache")
    assert "apt-get update" in caught.value.hint


def test_without_apt_the_hint_names_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GateError, match="apt-get is not installed") as caught:
        fetch(tmp_path / "cache")
    assert "IPSECGATE_LAB_CACHE" in caught.value.hint


def test_a_cache_path_below_a_file_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GateError, match="cannot write the kernel cache"):
        fetch(tmp_path / "file" / "cache")


def test_default_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IPSECGATE_LAB_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert default_cache() == Path("/x/ipsecgate")
    monkeypatch.setenv("IPSECGATE_LAB_CACHE", "/own")
    assert default_cache() == Path("/own")


@pytest.mark.parametrize(
    ("script", "expected"),
    [("exit 0", True), ("exit 2", False), ('case "$*" in *cbc*) exit 0; esac; exit 2', True)],
)
def test_the_kernel_has_esp_if_it_accepts_any_cipher(
    tools: Path, script: str, expected: bool
) -> None:
    stand_in(tools / "unshare", script)
    assert has_esp.__wrapped__() is expected


# --- the command line ------------------------------------------------------------


def test_main_reports_an_error_with_its_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("IPSECGATE_LAB_CACHE", str(tmp_path / "cache"))
    assert main(["--always", "--", "true"]) == 1
    assert "next: " in capsys.readouterr().err
