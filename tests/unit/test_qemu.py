"""The parts of the QEMU guest that need no QEMU: command line, initramfs, kernel image, modules."""

from __future__ import annotations

import lzma
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from ipsecgate.errors import GateError
from ipsecgate.lab import debian, packed
from ipsecgate.lab.qemu import INIT, archive, command_line, first_script, in_order

KERNEL = debian.DebianKernel(Path("/c d/boot/vmlinux"), Path("/m/6.1"), Path("/c d/bin/busybox"))
DEPENDENCIES = """\
kernel/fs/overlayfs/overlay.ko:
kernel/fs/9p/9p.ko: kernel/net/9p/9pnet.ko kernel/fs/netfs/netfs.ko
kernel/net/9p/9pnet_virtio.ko.xz: kernel/net/9p/9pnet.ko kernel/drivers/virtio/virtio-ring.ko
kernel/net/9p/9pnet.ko:
"""


def test_the_command_line_shares_the_root_read_only_and_escapes_commas() -> None:
    words = command_line(KERNEL, Path("/tmp/w"), 512, Path("/it's, here"), 9)
    assert words[words.index("-kernel") + 1] == "/c d/boot/vmlinux"
    assert "file:/dev/fd/9" in words
    shares = [word for word in words if word.startswith("local,")]
    assert ["readonly=on" in share for share in shares] == [True, False, False]
    assert "path=/it's,, here," in shares[2]


def test_a_module_is_loaded_once_and_after_its_dependencies() -> None:
    found = in_order(DEPENDENCIES, ["9pnet_virtio", "9p"])
    assert [Path(path).name for path in found] == [
        *("virtio-ring.ko", "9pnet.ko", "9pnet_virtio.ko.xz", "netfs.ko", "9p.ko")
    ]


def test_a_missing_module_is_a_clear_error() -> None:
    with pytest.raises(GateError, match="no module e1000"):
        in_order(DEPENDENCIES, ["e1000"])


def test_the_initramfs_has_the_newc_layout() -> None:
    made = archive(["bin"], {"init": b"12345"}, {"sh": "busybox"})
    names, modes, contents = [], [], []
    at = 0
    while at < len(made):
        assert made[at : at + 6] == b"070701"
        numbers = [int(made[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, length = numbers[1], numbers[6], numbers[11]
        names.append(made[at + 110 : at + 110 + length].decode())
        at += (110 + length + 3) // 4 * 4
        modes.append(mode)
        contents.append(made[at : at + size])
        at += (size + 3) // 4 * 4
    assert names == ["bin\0", "init\0", "bin/sh\0", "TRAILER!!!\0"]
    assert modes == [0o040755, 0o100755, 0o120777, 0]
    assert contents == [b"", b"12345", b"busybox", b""]


@pytest.mark.parametrize("script", [first_script(["9p.ko"]), INIT.read_text()])
def test_scripts_are_valid_shell(script: str) -> None:
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)


def image(payload: bytes) -> bytes:
    """Return a bzImage with two setup sectors and some bytes before its payload."""
    head = bytearray(3 * 512)
    head[0x1F1] = 2
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<II", head, 0x248, 100, len(payload))
    return bytes(head) + bytes(100) + payload + b"after"


def test_a_kernel_is_unpacked_whole() -> None:
    elf = b"\x7fELF" + bytes(range(256)) * 1000
    assert debian.uncompressed(image(lzma.compress(elf) + struct.pack("<I", len(elf)))) == elf


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "not a bzImage"),
        (bytes(4096), "not a bzImage"),
        (image(b"\x04\x22\x4d\x18 lz4"), "neither xz nor zstd"),
        (image(lzma.compress(b"x")[:20]), "truncated"),
        (image(packed.XZ + b"nonsense" * 9), "Corrupt input data"),
    ],
)
def test_an_invalid_kernel_image_is_an_error(raw: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        debian.uncompressed(raw)


@pytest.mark.skipif(shutil.which("zstd") is None, reason="missing: zstd")
def test_zstd_is_unpacked_whole_or_refused() -> None:
    elf = b"\x7fELF" + bytes(range(256)) * 1000
    made = subprocess.run(["zstd", "-c"], input=elf, capture_output=True, check=True).stdout
    assert debian.uncompressed(image(made + struct.pack("<I", len(elf)))) == elf
    for bad in (packed.ZSTD + b"nonsense" * 9, made[:-9]):
        with pytest.raises(ValueError, match="stdin"):  # in the words of zstd(1)
            debian.uncompressed(image(bad + struct.pack("<I", len(elf))))


def test_without_zstd_the_hint_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GateError, match="zstd is not installed") as caught:
        packed.unpack(packed.ZSTD + b"anything")
    assert caught.value.hint == "apt-get install zstd"


def test_an_uncompressed_kernel_stays_as_it_is() -> None:
    assert packed.unpack(packed.ELF + b"rest") == packed.ELF + b"rest"


def test_a_built_in_module_is_not_loaded() -> None:
    builtin = "kernel/net/9p/9pnet_virtio.ko\n"
    found = in_order(DEPENDENCIES, ["9pnet_virtio", "9p"], builtin)
    assert [Path(path).name for path in found] == ["netfs.ko", "9pnet.ko", "9p.ko"]


def test_without_qemu_the_hint_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GateError, match="not installed") as caught:
        debian.fetch(tmp_path)
    assert "qemu-system-x86" in caught.value.hint
