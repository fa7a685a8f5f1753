#!/bin/bash
# Try packaging/ansible: lint it, then roll out to a fleet of hosts with a real systemd each, as root.
#
# run.sh [HOSTS]    how many hosts, 4 or more; by default 20
#
# The root of the hosts (400 MB) is in the lab's cache, Ansible in .cache/fleet, and the package in dist/,
# where `make package` builds it if it is not there.
set -euo pipefail
cd "$(dirname "$0")/../.."
[ "$(id -u)" -eq 0 ] || { echo "$0: run it as root" >&2; exit 1; }
tools=$PWD/.cache/fleet/tools-$(sha256sum tests/fleet/requirements.txt | cut -c1-12)
cache=${IPSECGATE_LAB_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/ipsecgate}/fleet
packages=systemd,python3,python3-apt,charon-systemd,strongswan-swanctl

if [ ! -d "$tools" ]; then
    rm -rf .cache/fleet/tools-*
    mkdir -p .cache/fleet
    python3 -m venv "$tools"
    "$tools/bin/pip" install -qq -r tests/fleet/requirements.txt
fi
(cd packaging/ansible && PATH=$tools/bin:$PATH ansible-lint --offline -q . && echo "ansible-lint: no finding")

set -- "${1:-20}" dist/bookworm/ipsecgate_*.deb
[ -e "$2" ] || { packaging/package.sh bookworm; set -- "$1" dist/bookworm/ipsecgate_*.deb; }
packages+=,$(dpkg-deb --field "$2" Depends | sed 's/ *([^)]*)//g; s/:any//g; s/ //g')
root=$cache/bookworm-$(sha256sum <<<"$packages" | cut -c1-8)
if [ ! -d "$root" ]; then
    echo "making a root of Debian 12 for the hosts"
    command -v mmdebstrap >/dev/null ||
        DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends mmdebstrap
    rm -rf "$cache"
    mkdir -p "$cache"
    mmdebstrap --quiet --mode=root --variant=minbase --format=directory \
        --aptopt='APT::Install-Recommends "false"' --include="$packages" \
        bookworm "$root.part" "$(packaging/package.sh --mirror)"
    mv "$root.part" "$root"
fi
exec .venv/bin/python -m tests.fleet --tools "$tools/bin" --root "$root" --package "$2" --hosts "$1"
