"""Another tool's program that allows no other on its cgroup: which hooks run there all the same."""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from ipsecgate.core.tables.layout import Reason
from ipsecgate.edges.bpf import libbpf
from ipsecgate.edges.bpf.exclusive import ALLOW_OVERRIDE, ExclusiveProgramError
from ipsecgate.edges.bpf.objects import HOOKS
from ipsecgate.edges.host import cgroups
from tests.system.caller import Caller
from tests.system.hooked_cgroup import OTHER, PEER, HookedCgroup

# r0 = 1; exit
ALLOW = struct.pack("=BBhi", 0xB7, 0, 0, 1) + struct.pack("=BBhi", 0x95, 0, 0, 0)


@contextmanager
def foreign(cgroup: Path, flags: int = 0) -> Iterator[None]:
    """Attach another tool's program to a cgroup at every hook, as bpf(2) did before links."""
    with ExitStack() as stack:
        folder = stack.enter_context(libbpf.closing_fd(os.open(cgroup, os.O_RDONLY)))
        for hook, kind in HOOKS.items():
            program = libbpf.load_program(f"their_{hook}", ALLOW, *kind)
            stack.enter_context(libbpf.closing_fd(program))
            words = folder, kind.attach_type
            libbpf.call("attach", "bpf_prog_attach", program, *words, flags)
            stack.callback(libbpf.call, "detach", "bpf_prog_detach2", program, *words)
        yield


@pytest.fixture
def tree(unique: str) -> Iterator[tuple[Path, Path, Path]]:
    """A cgroup, the other tool's inside it, and a service's in that."""
    above = cgroups.root() / f"{unique}-above"
    held = above / "held"
    app = held / "app"
    app.mkdir(parents=True)
    yield above, held, app
    for path in (app, held, above):
        path.rmdir()


@contextmanager
def gated(hooked: HookedCgroup, cgroup: Path) -> Iterator[None]:
    hooked.pins.attach(cgroup)
    try:
        yield
    finally:
        hooked.pins.detach(cgroup.stat().st_ino)


def way_out(hooked: HookedCgroup, cgroup: Path) -> str:
    """Return the hint of the error, after which nothing is attached."""
    with pytest.raises(ExclusiveProgramError, match="has BPF program") as caught:
        hooked.pins.attach(cgroup)
    ids = {attachment.cgroup_id for attachment in hooked.pins.attachments()}
    assert cgroup.stat().st_ino not in ids
    return caught.value.hint


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_the_hooks_of_a_cgroup_above_run_beside_an_exclusive_program(
    hooked: HookedCgroup, tree: tuple[Path, Path, Path], first: str
) -> None:
    above, held, app = tree
    hooked.data.set_tunnels(())
    steps: list[Callable[[], AbstractContextManager[None]]] = [
        lambda: foreign(held),
        lambda: gated(hooked, above),
    ]
    with ExitStack() as stack:
        for step in steps if first == "theirs" else reversed(steps):
            stack.enter_context(step())
        for cgroup in (held, app):
            assert f"or gate {above}, whose hooks run" in way_out(hooked, cgroup)
        caller = Caller(hooked.namespace.path, app)
        stack.callback(caller.close)
        for family in (4, 6):
            assert caller("tcp", PEER[family]) == caller("sendto", PEER[family]) == "EPERM"
            assert caller("tcp", OTHER[family]) == "EINPROGRESS"
        assert caller("raw", PEER[4]) == "EPERM", "the backstop runs, too"
        assert hooked.counted(Reason.BLOCK_CLEAR) == 1


def test_nothing_can_be_gated_instead_of_the_root(
    hooked: HookedCgroup, tree: tuple[Path, Path, Path]
) -> None:
    with foreign(cgroups.root()):
        for cgroup in (tree[2], cgroups.root()):
            assert "no cgroup above it can be gated instead" in way_out(hooked, cgroup)


def test_a_program_that_ours_replaces_is_named(
    hooked: HookedCgroup, tree: tuple[Path, Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    _above, held, app = tree
    with foreign(held, ALLOW_OVERRIDE), caplog.at_level(logging.WARNING), gated(hooked, app):
        assert f"(their_connect4) of {held} no longer runs at connect4 for {app}" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING), gated(hooked, app):
        assert not caplog.text
