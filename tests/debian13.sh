#!/bin/bash
# Debian 13 beside this machine's Debian: a root made by debootstrap, with nothing but git and make,
# in which the README's two commands run on a fresh clone of what is committed here.
#
# debian13.sh          a new root; `make demo`, `make test`; nothing may be skipped
# debian13.sh CMD...   in the root of the last time, with what is committed by now: that command
#
# DEBIAN=forky takes another release, ARGS reaches pytest. Mirror, proxies and certificates are those
# of this machine's apt, pip and environment. In the lab's cache stay the naked root, Debian's
# packages and pip's, so that a second run downloads little, and the root of the last run.
# All processes are in a pid namespace, all mounts in a mount namespace: nothing of them stays.
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")/.."
release=${DEBIAN:-trixie}
cache=${IPSECGATE_LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ipsecgate}/$release
base=$cache/base root=$cache/root
checkout=/root/ipsecgate

# Our second life, in namespaces of our own: pivot_root, or a tool in there that looks at its mounts
# would see this machine's.
enter() {
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount -t sysfs sysfs "$root/sys"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    mount -t bpf bpf "$root/sys/fs/bpf"
    mount --rbind /dev "$root/dev"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    mount --bind "$cache/archives" "$root/var/cache/apt/archives"
    mount --bind "$cache/pip" "$root/root/.cache/pip"
    cp -L /etc/resolv.conf "$root/etc/resolv.conf"
    cd "$root"
    pivot_root . mnt
    umount -l /mnt
    cd "$checkout"
    local kept=() name
    for name in $(compgen -e); do
        case "$name" in
            TERM|LANG|*_[pP][rR][oO][xX][yY]|PIP_*|SSL_CERT_*|*_CA_BUNDLE|ARGS|LIMIT|CHAOS_*|ORACLE_*)
                kept+=("$name=${!name}") ;;
        esac
    done
    exec env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root \
        "${kept[@]}" "$@"
}

inside() { # CMD...: run it in the root
    unshare --mount --propagation private --pid --fork --kill-child=KILL "$0" --enter "$@"
}

# Where this machine's apt has Debian from (the first index of main that is no security archive's),
# and with which settings.
mirror() {
    apt-get indextargets --format '$(RELEASE) $(COMPONENT) $(REPO_URI)' 'Identifier: Packages' |
        awk '$1 !~ /-/ && $2 == "main" && $3 ~ /\/debian\/$/ {print $3; exit}'
}
settings() { apt-config dump | grep -E '^Acquire::(https?|Check|Retries)' || true; }

make_base() {
    local from
    from=$(mirror)
    [ -n "$from" ] || { echo "apt has no mirror of Debian here" >&2; return 1; }
    echo "$release into $base, from $from"
    rm -rf "$base"
    eval "$(apt-config shell http_proxy Acquire::http::Proxy)"
    ${http_proxy:+env http_proxy="$http_proxy"} debootstrap --variant=minbase \
        --include=ca-certificates,git,make "$release" "$base.part" "$from" >"$cache/debootstrap.log" || {
        tail "$cache/debootstrap.log" >&2
        return 1
    }
    settings >"$base.part/etc/apt/apt.conf.d/90machine"
    printf 'Types: deb\nURIs: %s\nSuites: %s %s-updates\nComponents: main\nSigned-By: %s\n' \
        "$from" "$release" "$release" /usr/share/keyrings/debian-archive-keyring.gpg \
        >"$base.part/etc/apt/sources.list.d/debian.sources"
    rm -f "$base.part/etc/apt/sources.list"
    mv "$base.part" "$base"
}

# A fresh copy, and a fresh clone in it.
make_root() {
    rm -rf "$root"
    cp -a --reflink=auto "$base" "$root"
    mkdir -p "$root/root/.cache/pip"
    cp /usr/local/share/ca-certificates/*.crt "$root/usr/local/share/ca-certificates/" 2>/dev/null || true
    [ ! -e /etc/pip.conf ] || cp /etc/pip.conf "$root/etc/"
    chroot "$root" update-ca-certificates >/dev/null 2>&1
    git clone --quiet --no-hardlinks . "$root$checkout"
}

if [ "${1-}" = --enter ]; then
    enter "${@:2}"
fi
[ "$(id -u)" -eq 0 ] || { echo "$0: only root can make another root" >&2; exit 1; }
command -v debootstrap >/dev/null ||
    DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends debootstrap
mkdir -p "$cache/archives/partial" "$cache/pip"
[ -z "$(git status --porcelain)" ] || { echo "not committed, so not in there:"; git status --short; }
if [ $# -gt 0 ]; then
    git -C "$root$checkout" fetch --quiet "$PWD" HEAD
    git -C "$root$checkout" checkout --quiet --force --detach FETCH_HEAD
    inside "$@"
    exit
fi
[ -d "$base" ] || make_base
make_root
echo "Debian $(cat "$root/etc/debian_version") in $root, $(git -C "$root$checkout" log -1 --format='%h %s')"
status=0
inside make demo || status=$?
inside make --keep-going test "ARGS=${ARGS-}" || status=$?
inside dpkg-query -W linux-libc-dev libc6 python3 python3-bpfcc charon-systemd openjdk-21-jre-headless || true
inside .venv/bin/python -m tests.results .cache/results/{unit,beside,system}.xml || status=$?
exit "$status"
