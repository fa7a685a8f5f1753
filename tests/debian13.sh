#!/bin/bash
# Run the README's two commands on Debian 13, on any Debian: in a new root made by debootstrap, which
# contains only git and make, on a fresh clone of the current commit.
#
# debian13.sh          make a new root and run `make demo` and `make test`; nothing may fail or skip
# debian13.sh CMD...   run a command in the root of the last run, on the current commit
#
# DEBIAN names another release; ARGS are extra arguments for pytest. Mirror, proxies and certificates
# are those of this machine's apt, pip and environment. The lab's cache keeps the bare root, Debian's
# packages, so that the next run downloads little, and the root of the last run: 3 GB.
# Processes and mounts are in namespaces of their own, so none is left behind.
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")/.."
release=${DEBIAN:-trixie}
cache=${IPSECGATE_LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ipsecgate}/$release
base=$cache/base root=$cache/root
checkout=/root/ipsecgate

# inside CMD...: run a command in the root, in new namespaces.
inside() {
    unshare --mount --propagation private --pid --fork --kill-child=KILL "$0" --enter "$@"
}

# The other half of `inside`. Use pivot_root: a plain chroot would show this machine's mounts.
enter() {
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount -t sysfs sysfs "$root/sys"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    mount -t bpf bpf "$root/sys/fs/bpf"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    mount --bind "$cache/archives" "$root/var/cache/apt/archives"
    cp -L /etc/resolv.conf /etc/hosts "$root/etc"
    cd "$root"
    pivot_root . mnt
    umount -l /mnt
    cd "$checkout"
    local kept=() name
    for name in $(compgen -e); do
        case $name in
            TERM | LANG | *_[pP][rR][oO][xX][yY] | PIP_* | SSL_CERT_* | *_CA_BUNDLE | ARGS | LIMIT)
                kept+=("$name=${!name}") ;;
        esac
    done
    exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
        "${kept[@]}" "$@"
}

# Print the mirror of Debian's main section; security and updates are other suites.
mirror() {
    apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Identifier: Packages' |
        awk '$1 !~ /-/ && $2 == "main" && $3 ~ /\/debian\/$/ && !n++ {print $3}'
}

# Print apt's network settings, except those that refer to programs on this machine.
apt_settings() {
    apt-config dump | grep -E '^Acquire::(https?|Check|Retries)' | grep -v Auto-Detect || true
}

make_base() {
    local from
    from=$(mirror)
    [ -n "$from" ] || { echo "apt knows no Debian mirror: run apt-get update" >&2; return 1; }
    echo "installing $release from $from into $base"
    rm -rf "$base.part"
    (
        eval "$(apt-config shell http_proxy Acquire::http::Proxy)"
        [ -z "${http_proxy-}" ] || export http_proxy
        debootstrap --variant=minbase --include=ca-certificates,git,make "$release" "$base.part" \
            "$from" >"$cache/debootstrap.log" || { tail "$cache/debootstrap.log" >&2; exit 1; }
    )
    rm "$base.part/var/cache/apt/archives"/*.deb
    mv "$base.part" "$base"
}

# Copy the bare root, add this machine's network settings and a fresh clone.
make_root() {
    rm -rf "$root"
    cp -a --reflink=auto "$base" "$root"
    apt_settings >"$root/etc/apt/apt.conf.d/90machine"
    local name
    for name in /etc/pip.conf "$HOME"/{.pip,.config/pip}/pip.conf; do
        [ ! -e "$name" ] || install -D -m 644 "$name" "$root${name/#$HOME//root}"
    done
    for name in /usr/local/share/ca-certificates/*.crt; do
        cp "$name" "$root/usr/local/share/ca-certificates/"
    done
    chroot "$root" update-ca-certificates >/dev/null 2>&1
    git clone --quiet --no-hardlinks . "$root$checkout"
}

[ "${1-}" != --enter ] || enter "${@:2}"
[ "$(id -u)" -eq 0 ] || { echo "$0: run it as root" >&2; exit 1; }
command -v debootstrap >/dev/null ||
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends debootstrap
mkdir -p "$cache/archives/partial"
[ -z "$(git status --porcelain)" ] || { echo "not committed, so not tested:"; git status --short; }
if [ $# -gt 0 ]; then
    git -C "$root$checkout" fetch --quiet "$PWD" HEAD
    git -C "$root$checkout" checkout --quiet --force --detach FETCH_HEAD
    inside "$@"
    exit
fi
[ -d "$base" ] || make_base
make_root
echo "Debian $(cat "$root/etc/debian_version") in $root: $(git log -1 --format='%h %s')"
status=0
inside make demo || status=$?
inside make test || status=$?
inside dpkg-query -W charon-systemd libc6 python3 python3-bpfcc || status=$?
inside .venv/bin/python -m tests.results .cache/results/{unit,first-guest,second-guest}.xml || status=$?
exit "$status"
