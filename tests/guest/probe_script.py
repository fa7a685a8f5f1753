"""A script for a guest, whose output shows how the guest was set up."""

from __future__ import annotations

from pathlib import Path

ODD = "two\nlines 'single' \"double\" $HOME ö"
MARKER_FILE = Path("/etc/ipsecgate-guest-was-here")
ESP = (
    "ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x100 mode tunnel"
    " aead 'rfc4106(gcm(aes))' 0x1111111111111111111111111111111111111111 128"
)
SCRIPT = f"""
printf '%s\\n' "cwd=$PWD" "odd=$ODD" "home=${{HOME-unset}}" "uid=$(id -u)" "clock=$(date +%s)"
echo gone >{MARKER_FILE}
{ESP} && ip xfrm state
mkdir "$IPSECGATE_RESULTS/sub" && echo '<testsuite/>' >"$IPSECGATE_RESULTS/sub/junit.xml"
stat -f -c 'fs=%T' /sys/fs/cgroup /sys/fs/bpf
modprobe veth && echo veth
printf 'cr?\\n' >&2
seq 20000
printf 'no newline at the end'
exit 7
"""


def folder_of(output: str) -> Path:
    """Return the guest's temporary folder; `output` begins with IPSECGATE_RESULTS, inside it."""
    folder = Path(output.partition("\n")[0]).parent
    assert folder.name.startswith("ipsecgate-guest-")
    return folder
