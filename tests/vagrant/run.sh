#!/bin/bash
# Run a real `vagrant up` of vagrant/Vagrantfile, unchanged, and the commands of vagrant/README.md; this
# is `make vagrant-test`.
#
# Run it as root. Everything is in new namespaces: libvirt, its networks and the machines see only their
# own network, leave nothing behind, and end with this script. So the box (box.sh) must contain all that
# the provisioning needs. The default driver is QEMU's emulation, which needs no hardware virtualisation
# and takes about ten minutes; IPSECGATE_TEST_DRIVER=kvm is faster where KVM works.
set -euo pipefail
checkout=$(cd "$(dirname "$0")/../.." && pwd)
cache=$checkout/.cache/vagrant
box=$cache/ipsecgate.box
log=$checkout/.cache/results/vagrant.log
export VAGRANT_HOME=$cache/home VAGRANT_DOTFILE_PATH=$cache/dot VAGRANT_CHECKPOINT_DISABLE=1
export VAGRANT_DEFAULT_PROVIDER=libvirt IPSECGATE_TEST_DRIVER=${IPSECGATE_TEST_DRIVER:-qemu}
packages=(
    vagrant vagrant-libvirt libvirt-daemon libvirt-clients qemu-system-x86 qemu-utils dnsmasq-base
    iptables dbus-daemon dmidecode mmdebstrap openssh-client rsync tcpdump
)

say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

fail() {
    echo "vagrant-test: $*" >&2
    exit 1
}

# Remove Vagrant's thousands of progress bars.
plain() { tr '\r' '\n' | grep --line-buffered -v 'Progress: [0-9]*%' || true; }

prepare() {
    local package missing=() made_of
    cd "$checkout"
    for package in "${packages[@]}"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            missing+=("$package")
    done
    if [ "${#missing[@]}" -gt 0 ]; then
        DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends \
            "${missing[@]}"
    fi
    mkdir -p "$cache" "${log%/*}"
    vagrant box list >/dev/null  # Vagrant's very first run writes its well-known key
    ssh-keygen -y -f "$VAGRANT_HOME/insecure_private_key" >"$cache/key.pub"
    made_of=$(cat tests/vagrant/box.* constraints.txt pyproject.toml "$cache/key.pub" \
        <(vagrant/provision.sh packages) | sha256sum)
    if [ ! -f "$box" ] || [ "$made_of" != "$(cat "$box.made-of" 2>/dev/null)" ]; then
        say "building the box"
        tests/vagrant/box.sh "$box" .venv/bin/pip "$cache/key.pub"
        echo "$made_of" >"$box.made-of"
    fi
}

# Run libvirt without systemd, with all that it writes in a temporary folder.
start_libvirt() {
    local own=$cache/libvirt folder
    rm -rf "$own"
    mkdir "$own"
    ip link set lo up
    mount -t sysfs sysfs /sys  # of this network namespace
    mount -t tmpfs tmpfs /run
    mkdir -p /run/dbus /run/lock /etc/libvirt /var/lib/libvirt /var/cache/libvirt /var/log/libvirt
    for folder in etc lib cache log; do mkdir "$own/$folder"; done
    mount --bind "$own/etc" /etc/libvirt
    mount --bind "$own/lib" /var/lib/libvirt
    mount --bind "$own/cache" /var/cache/libvirt
    mount --bind "$own/log" /var/log/libvirt
    # It looks up the user of its package even if another one is configured.
    cp /etc/passwd /etc/group "$own"
    getent passwd libvirt-qemu >/dev/null || echo 'libvirt-qemu:x:64055:64055::/:/bin/false' >>"$own/passwd"
    getent group libvirt-qemu >/dev/null || echo 'libvirt-qemu:x:64055:' >>"$own/group"
    getent group kvm >/dev/null || echo 'kvm:x:64056:' >>"$own/group"
    mount --bind "$own/passwd" /etc/passwd
    mount --bind "$own/group" /etc/group
    printf 'auth_unix_rw = "none"\nauth_unix_ro = "none"\n' >/etc/libvirt/libvirtd.conf
    printf '%s\n' 'user = "root"' 'group = "root"' 'security_driver = "none"' 'namespaces = []' \
        'cgroup_controllers = []' 'remember_owner = 0' 'stdio_handler = "file"' >/etc/libvirt/qemu.conf
    dbus-daemon --system --fork --nopidfile
    libvirtd >"$own/log/libvirtd" 2>&1 &
    for _ in {1..100}; do
        ! virsh --quiet --connect qemu:///system uri >/dev/null 2>&1 || return 0
        sleep 0.2
    done
    cat "$own/log/libvirtd" >&2
    fail "libvirtd does not answer"
}

# Capture on the host's end of the cable, which sees the packets of both machines.
watch_cable() {
    local bridge
    bridge=$(virsh --connect qemu:///system net-info ipsecgate | awk '/^Bridge/ { print $2 }')
    : >"$cache/tcpdump"
    tcpdump -i "$bridge" --immediate-mode -U -w "$cache/cable" \
        'host 192.168.56.10 and host 192.168.56.11' 2>"$cache/tcpdump" &
    watcher=$!
    until grep -q 'listening on' "$cache/tcpdump"; do
        kill -0 "$watcher" 2>/dev/null || fail "$(cat "$cache/tcpdump")"
        sleep 0.1
    done
}

seen() { tcpdump -r "$cache/cable" "$1" 2>/dev/null | wc -l; }

judge_cable() {
    local esp ike clear
    kill "$watcher"
    wait "$watcher" || true
    # IKE continues on port 4500, with four zero bytes where ESP in UDP has its SPI (RFC 3948, 2.2).
    local is_ike='(udp port 500 or (udp port 4500 and udp[8:4] = 0))'
    esp=$(seen esp) ike=$(seen "$is_ike") clear=$(seen "not esp and not arp and not $is_ike")
    echo "on the cable between the machines: $esp ESP, $ike IKE, $clear cleartext"
    [ "$esp" -gt 0 ] && [ "$ike" -gt 0 ] && [ "$clear" -eq 0 ] || fail "expected ESP, IKE and no cleartext"
}

gate() { vagrant ssh gate -c "$1" 2>/dev/null; }

run_readme_commands() {
    say "$1"
    gate 'sudo ipsecgate status'
    watch_cable
    gate 'sudo first-connection'
    judge_cable
}

# After a boot the hooks are loaded before ssh starts, and the controller is ready soon after.
wait_ready() {
    local limit=$((SECONDS + 300))
    until gate 'sudo ipsecgate status' >/dev/null; do
        [ "$SECONDS" -lt "$limit" ] || fail "the gate is not ready: $(gate 'sudo ipsecgate status')"
        sleep 5
    done
}

inside() {
    start_libvirt
    cd "$checkout/vagrant"
    rm -rf "$VAGRANT_DOTFILE_PATH"
    trap 'rm -rf "$cache"/libvirt/lib/*' EXIT
    vagrant box add --force --name debian/bookworm64 "$box" >/dev/null
    say "vagrant up"
    vagrant up 2>&1 | plain
    say "both machines are up"
    run_readme_commands "after provisioning"
    say "vagrant reload gate"
    vagrant reload gate
    wait_ready
    run_readme_commands "after a reboot"
    say "vagrant destroy"
    vagrant destroy --force
    say "vagrant-test passed"
}

if [ "${1-}" = inside ]; then
    inside
    exit
fi
[ "$(id -u)" -eq 0 ] || fail "run it as root"
prepare
unshare --net --mount --pid --fork --kill-child --mount-proc "$0" inside 2>&1 | tee "$log"
