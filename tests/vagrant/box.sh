#!/bin/bash
# Build a Vagrant box of Debian 12 for libvirt in which vagrant/provision.sh needs no network.
#
# box.sh BOX PIP KEY   write the file BOX, as root; PIP is a pip that can reach its index, KEY the file
#                      of the public ssh key that Vagrant logs in with
#
# It differs from debian/bookworm64 in three ways: the packages that the provisioning would install are
# installed already, pip finds its wheels in /opt/wheels, and QEMU boots the kernel directly, because
# a boot loader is slow under emulation. apt uses this machine's mirror, proxy and keys.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
checkout=$here/../..
box=$(realpath -m "$1") pip=$2 key=$3
suite=bookworm
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
root=$work/root

# A box needs a kernel, systemd, ssh, and the programs that Vagrant itself runs.
machine=(
    linux-image-amd64 initramfs-tools lz4 systemd-sysv dbus udev kmod
    openssh-server sudo rsync ifupdown isc-dhcp-client iproute2 procps ca-certificates
)
mapfile -t packages < <("$checkout/vagrant/provision.sh" packages)

# Download the dependencies in the versions of constraints.txt, and the build backend.
wheels() {
    local needs
    mapfile -t needs < <(sed -n 's/^requires = \["\(.*\)"\]/\1/p
        /^dependencies = \[/,/^]/s/^ *"\(.*\)",/\1/p' "$checkout/pyproject.toml")
    "$pip" download --quiet --quiet --dest "$work/wheels" --only-binary=:all: --python-version 3.11 \
        --constraint "$checkout/constraints.txt" "${needs[@]}"
}

configure() {
    echo bookworm >"$root/etc/hostname"
    printf '127.0.0.1 localhost\n' >"$root/etc/hosts"
    printf '/dev/vda / ext4 noatime 0 1\n' >"$root/etc/fstab"
    printf 'auto lo eth0\niface lo inet loopback\niface eth0 inet dhcp\n' \
        >"$root/etc/network/interfaces"
    printf '[global]\nno-index = true\nfind-links = /opt/wheels\n' >"$root/etc/pip.conf"
    install -d "$root/opt/wheels"
    install -m 644 "$work"/wheels/*.whl "$root/opt/wheels/"
    # There is no DNS server that could answer.
    printf 'UseDNS no\n' >"$root/etc/ssh/sshd_config.d/box.conf"
    chroot "$root" useradd --create-home --shell /bin/bash vagrant
    echo 'vagrant ALL=(ALL) NOPASSWD: ALL' >"$root/etc/sudoers.d/vagrant"
    install -d -m 700 "$root/home/vagrant/.ssh"
    install -m 600 "$key" "$root/home/vagrant/.ssh/authorized_keys"
    chroot "$root" chown -R vagrant: /home/vagrant
    rm -f "$root"/etc/ssh/ssh_host_*
    chroot "$root" ssh-keygen -q -A
    # These are not needed, and each costs seconds of an emulated boot.
    chroot "$root" systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
        e2scrub_reap.service fstrim.timer systemd-timesyncd.service 2>/dev/null
}

pack() {
    cp -L "$root/vmlinuz" "$root/initrd.img" "$work/"
    truncate --size 4G "$work/disk"
    mke2fs -q -t ext4 -d "$root" "$work/disk"
    qemu-img convert -O qcow2 "$work/disk" "$work/box.img"
    printf '{"provider": "libvirt", "format": "qcow2", "virtual_size": 4}\n' >"$work/metadata.json"
    cp "$here/box.rb" "$work/Vagrantfile"
    mkdir -p "$(dirname "$box")"
    tar --create --sparse --file "$box.part" --directory "$work" \
        metadata.json Vagrantfile vmlinuz initrd.img box.img
    mv "$box.part" "$box"
}

wheels
# Include only the modules for QEMU's disk: a small initramfs unpacks quickly.
install -d "$work/initramfs/conf.d"
printf 'MODULES=list\nCOMPRESS=lz4\nFSTYPE=ext4\n' >"$work/initramfs/conf.d/box"
printf '%s\n' virtio_pci virtio_blk ext4 >"$work/initramfs/modules"
mmdebstrap --quiet --mode=root --variant=minbase --format=directory \
    --include="$(IFS=,; echo "${machine[*]},${packages[*]}")" \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --essential-hook='mkdir "$1/etc/initramfs-tools"' \
    --essential-hook="sync-in '$work/initramfs' /etc/initramfs-tools" "$suite" "$root"
configure
pack
