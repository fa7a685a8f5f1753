#!/bin/bash
# Build the container image from the Debian package, without a registry.
#
# build.sh DEB [ARCHIVE]    ARCHIVE: the image for `podman load`, `docker load` or `ctr images import`;
#                           by default dist/ipsecgate-image.tar
#
# DEB is for Debian 13. The image has its files, libraries, Python, ip(8) and unshare(1), which `check`
# runs; no shell and no package manager. MIRROR and TAG may be set. Equal packages give an equal root.
set -euo pipefail
[ "$(id -u)" -eq 0 ] || { echo "$0: run it as root: it needs chroot(8)" >&2; exit 1; }
[ $# -ge 1 ] || { echo "usage: $0 DEB [ARCHIVE]" >&2; exit 2; }
here=$(dirname "$(realpath "$0")")
deb=$(realpath "$1")
archive=$(realpath -m "${2:-dist/ipsecgate-image.tar}")
version=$(dpkg-deb --field "$deb" Version)
tag=${TAG:-localhost/ipsecgate:${version%%-*}}
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$here" log -1 --format=%ct)}
export SOURCE_DATE_EPOCH
umask 022
work=$(mktemp -d "${TMPDIR:-/tmp}/ipsecgate-image.XXXXXX")
trap 'rm -rf "$work"' EXIT

for tool in mmdebstrap podman; do
    command -v "$tool" >/dev/null || { echo "$0: $tool is missing: packaging/setup.sh image" >&2; exit 1; }
done

# Only unpacked: no maintainer script runs, so nothing needs sh or dpkg.
depends=$(dpkg-deb --field "$deb" Depends | sed 's/ *([^)]*)//g; s/:any//g; s/ *|[^,]*//g; s/ //g')
mmdebstrap --quiet --mode=root --variant=extract --format=directory --include="$depends,util-linux" \
    trixie "$work/root" "${MIRROR:-$("$here/../package.sh" --mirror)}"
dpkg-deb --extract "$deb" "$work/root"
cd "$work/root"
for folder in bin sbin lib lib64; do ln -s "usr/$folder" "$folder"; done
printf 'root:x:0:0:root:/root:/usr/sbin/nologin\n' >etc/passwd
printf 'root:x:0:\n' >etc/group
mv usr/share/iproute2 usr/share/ipsecgate "$work"
find usr/bin usr/sbin ! -type d ! -name 'python3*' ! -name ipsecgate ! -name ip ! -name unshare -delete
rm -rf dev/* etc/{pam.d,security,default,init.d,rc*.d,cron*} usr/share/* usr/games usr/include usr/local \
    usr/lib/{dpkg,systemd,tmpfiles.d,udev,mime,valgrind} usr/lib/*-linux-gnu/{gconv,security} \
    usr/lib/python3*/pydoc_data var/lib var/cache var/log
mv "$work/iproute2" "$work/ipsecgate" usr/share
mkdir -p proc root run/ipsecgate var/cache/ipsecgate sys/fs/bpf sys/fs/cgroup etc/ipsecgate/policies.d
# Python's bytecode is made here, because the root is read-only later, and without times.
find . -name __pycache__ -type d -prune -exec rm -rf {} +
chroot . /usr/bin/python3 -m compileall -q --invalidation-mode unchecked-hash \
    /usr/lib/ipsecgate /usr/lib/python3 "/usr/lib/$(readlink usr/bin/python3)"
cd "$work"
tar --create --file root.tar --directory root --sort=name --numeric-owner --owner=0 --group=0 \
    --mtime="@$SOURCE_DATE_EPOCH" .
cp "$here/Containerfile" .
mkdir -p "$(dirname "$archive")"
rm -f "$archive"
# podman's storage is here, too: the machine's own is left alone.
podman=(podman --root "$work/storage" --runroot "$work/run" --storage-driver vfs)
"${podman[@]}" build --quiet --timestamp "$SOURCE_DATE_EPOCH" --tag "$tag" . >/dev/null
"${podman[@]}" save --quiet --format docker-archive --output "$archive" "$tag"
echo "$archive: $tag, $(du --apparent-size -h "$archive" | cut -f1), root $(sha256sum <root.tar | cut -c1-16)"
