#!/bin/bash
# Make this checkout runnable: Debian's packages, a virtual environment in .venv, a test kernel.
#
# setup.sh         what the gate, its lab and the demo need
# setup.sh tests   what the tests need beside it: real clients, their servers, container runtimes
#
# Made for Debian 12 and newer with git and make. Only what is missing is installed. Everything
# that a tool says goes to .cache/setup.log, and is shown when the tool fails.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .cache
log=$PWD/.cache/setup.log
: >"$log"
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# BCC; the IKE daemon, and its plugin that does ESP without the kernel (Debian leaves it switched
# off); namespaces; the guest's modules; sysctl and ps for the lab.
packages=(
    python3-bpfcc python3-venv
    charon-systemd strongswan-swanctl libcharon-extra-plugins
    iproute2 kmod mount procps util-linux
)
# Clients as people use them, with the servers that they talk to. ecj compiles the Java client,
# where javac would be 70 MB. For the units systemd-analyze and the system calls' numbers, for
# the man page man. tcc builds what the test kernel needs on some CPUs.
test_packages=(
    busybox-static curl default-jre-headless ecj git golang-go ncat netcat-openbsd nodejs
    openssh-client openssh-server perl postgresql redis-server redis-tools wget
    crun podman runc
    linux-libc-dev man-db systemd tcc zstd
)
# The services that come with those packages.
declare -A services=(
    [charon-systemd]=strongswan.service
    [openssh-server]=ssh.service
    [podman]="podman.socket podman.service podman-restart.service
        podman-auto-update.timer podman-auto-update.service"
    [postgresql]=postgresql.service
    [redis-server]=redis-server.service
)
case "${1-}" in
    "") wanted=("${packages[@]}") ;;
    tests) wanted=("${test_packages[@]}") ;;
    *) echo "usage: $0 [tests]" >&2; exit 2 ;;
esac
policy=/usr/sbin/policy-rc.d
own_policy=

finish() {
    local status=$?
    [ -z "$own_policy" ] || rm -f "$policy"
    if [ "$status" -ne 0 ] && [ -s "$log" ]; then
        printf 'setup failed; the end of %s:\n' "$log" >&2
        tail -n 30 "$log" >&2
    fi
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# step TEXT CMD...: run CMD quietly, tell what is done and how long it took.
step() {
    local text=$1 began=${EPOCHREALTIME/./}
    shift
    printf '%s ... ' "$text"
    "$@" >>"$log" 2>&1 || { echo failed; return 1; }
    local spent=$(((${EPOCHREALTIME/./} - began) / 100000))
    printf '%d.%d s\n' $((spent / 10)) $((spent % 10))
}

installed() {
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

# A package's service starts when it is installed, and at every boot after. They are here for
# their programs only, so neither may happen on a machine that did not have them.
install_packages() {
    if [ ! -e "$policy" ]; then
        own_policy=yes
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
    fi
    apt-get install --yes --quiet --no-install-recommends "$@"
    command -v systemctl >/dev/null || return 0
    local package
    for package in "$@"; do
        # shellcheck disable=SC2086
        [ -z "${services[$package]-}" ] || systemctl disable ${services[$package]}
    done
}

make_venv() {
    # --system-site-packages: BCC's module is only there.
    [ -x .venv/bin/pip ] || /usr/bin/python3 -m venv --system-site-packages .venv
    .venv/bin/pip install -c constraints.txt -e '.[dev]'
}

make_clients() {
    mkdir -p .cache/clients
    CGO_ENABLED=0 go build -trimpath -o .cache/clients/dial tests/clients/dial.go
    # Not by its own ecj(1): Debian 13's names only the first of the two archives it is in there.
    local jars=/usr/share/java/eclipse-jdt-core
    java -cp "$jars.jar:$jars-compiler-batch.jar" org.eclipse.jdt.internal.compiler.batch.Main \
        -17 -proc:none -d .cache/clients tests/clients/Dial.java
}

missing=()
if ! command -v dpkg-query >/dev/null; then
    echo "setup: this is not Debian: install what gives ${wanted[*]}, then run it there" >&2
    exit 1
fi
for package in "${wanted[@]}"; do
    installed "$package" || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
    if [ "$(id -u)" -ne 0 ]; then
        echo "setup: not root, and these packages are missing. Either run it as root, or:" >&2
        echo "    apt-get install --no-install-recommends ${missing[*]}" >&2
        exit 1
    fi
    step "package lists" apt-get update --quiet
    step "installing ${missing[*]}" install_packages "${missing[@]}"
fi

if [ "${1-}" = tests ]; then
    step "clients in Go and Java" make_clients
    exit
fi
step "Python packages into .venv" make_venv
if [ "$(id -u)" -eq 0 ] && [[ "$(apt-cache policy user-mode-linux 2>>"$log")" != *Candidate* ]]; then
    step "package lists" apt-get update --quiet
fi
prepare=(.venv/bin/python -m ipsecgate.lab.prepare)

# What a test kernel needs beside its own package; $1 is why, the rest goes to `prepare`.
install_for_kernel() {
    local reason=$1 packages
    shift
    mapfile -t packages < <("${prepare[@]}" --packages "$@" 2>>"$log")
    [ "${#packages[@]}" -gt 0 ] || return 0
    if [ "$(id -u)" -ne 0 ]; then
        echo "setup: $reason. As root: apt-get install ${packages[*]}" >&2
        exit 1
    fi
    echo "$reason"
    step "installing ${packages[*]}" install_packages "${packages[@]}"
}

install_for_kernel "this CPU's registers need a library for the test kernel, and that a compiler"
if ! step "test kernel" "${prepare[@]}"; then
    tail -n 25 "$log"
    install_for_kernel "trying QEMU instead" --kernel qemu
    step "test kernel (QEMU)" "${prepare[@]}" --kernel qemu
fi
tail -n 1 "$log"
