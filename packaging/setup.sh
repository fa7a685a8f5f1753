#!/bin/bash
# Prepare this checkout: install Debian packages, a virtual environment in .venv and a test kernel.
#
# setup.sh         installs what the gate, its lab and the demo need
# setup.sh tests   installs what only the tests need: real clients, their servers, container runtimes
# setup.sh bench   installs what only `make bench` needs: a C compiler and matplotlib
# setup.sh image   installs what only `make image` needs: mmdebstrap and podman
# setup.sh image-tests  and what runs beside the image in its tests: Docker and containerd
#
# For Debian 12 and newer. Installs only what is missing. The output of the tools goes to
# .cache/setup.log; if one fails, the end of it is shown.
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p .cache
log=$PWD/.cache/setup.log
: >"$log"
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

# BCC; strongSwan, with the plugin that does ESP without the kernel (Debian disables it); ip and
# unshare; kmod for the modules of the test kernel; sysctl and ps for the lab.
packages=(
    python3-bpfcc python3-venv
    charon-systemd strongswan-swanctl libcharon-extra-plugins
    iproute2 kmod mount procps util-linux
)
# Widely used clients and their servers. ecj compiles the Java client; javac would take 70 MB.
# systemd-analyze and linux-libc-dev check the units, man and mandoc check the man pages, prometheus checks
# metrics and alerts, and tcc builds the library that the test kernel needs on some CPUs.
test_packages=(
    busybox-static curl default-jre-headless ecj fish git golang-go ncat netcat-openbsd nodejs
    openssh-client openssh-server perl postgresql redis-server redis-tools wget zsh
    crun podman runc iptables nftables
    linux-libc-dev man-db mandoc openssl prometheus systemd tcc zstd
)
bench_packages=(gcc libc6-dev)
image_packages=(crun mmdebstrap podman)
image_test_packages=("${image_packages[@]}" busybox-static containerd docker.io runc)
# The services that these packages start.
declare -A services=(
    [charon-systemd]=strongswan.service
    [containerd]=containerd.service
    [docker.io]="docker.service docker.socket"
    [openssh-server]=ssh.service
    [podman]="podman.socket podman.service podman-restart.service
        podman-auto-update.timer podman-auto-update.service"
    [postgresql]=postgresql.service
    [prometheus]=prometheus.service
    [redis-server]=redis-server.service
)
case "${1-}" in
    "") wanted=("${packages[@]}") ;;
    tests) wanted=("${test_packages[@]}") ;;
    bench) wanted=("${bench_packages[@]}") ;;
    image) wanted=("${image_packages[@]}") ;;
    image-tests) wanted=("${image_test_packages[@]}") ;;
    *) echo "usage: $0 [tests | bench | image | image-tests]" >&2; exit 2 ;;
esac
policy=/usr/sbin/policy-rc.d
own_policy=

finish() {
    local status=$?
    [ -z "$own_policy" ] || rm -f "$policy"
    if [ "$status" -ne 0 ] && [ -s "$log" ]; then
        printf 'setup failed. The end of %s:\n' "$log" >&2
        tail -n 30 "$log" >&2
    fi
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# step TEXT CMD...: print TEXT, run CMD with its output in the log, and print how long it took.
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

# Installing a package starts its service and enables it at boot. We need only the programs, so
# prevent both: policy-rc.d denies the start, and the service is disabled afterwards.
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
    # --system-site-packages, because BCC's module is only in Debian's packages.
    [ -x .venv/bin/pip ] || /usr/bin/python3 -m venv --system-site-packages .venv
    .venv/bin/pip install -c constraints.txt -e '.[dev]'
}

install_plots() {
    .venv/bin/pip install -c constraints.txt -e '.[bench]'
}

make_clients() {
    mkdir -p .cache/clients
    CGO_ENABLED=0 go build -trimpath -o .cache/clients/dial tests/clients/dial.go
    # Not with ecj(1): on Debian 13 it loads only the first of its two archives.
    local jars=/usr/share/java/eclipse-jdt-core
    java -cp "$jars.jar:$jars-compiler-batch.jar" org.eclipse.jdt.internal.compiler.batch.Main \
        -17 -proc:none -d .cache/clients tests/clients/Dial.java
}

missing=()
if ! command -v dpkg-query >/dev/null; then
    echo "setup: this is not Debian. Use Debian, or set it up by hand with what these packages" \
        "contain: ${wanted[*]}" >&2
    exit 1
fi
for package in "${wanted[@]}"; do
    installed "$package" || missing+=("$package")
done
if [ "${#missing[@]}" -gt 0 ]; then
    if [ "$(id -u)" -ne 0 ]; then
        echo "setup: packages are missing. Run it as root, or first install them as root:" >&2
        echo "    apt-get install --no-install-recommends ${missing[*]}" >&2
        exit 1
    fi
    step "updating the package lists" apt-get update --quiet
    step "installing ${missing[*]}" install_packages "${missing[@]}"
fi

if [ "${1-}" = tests ]; then
    step "compiling the Go and Java clients" make_clients
    step "installing matplotlib into .venv" install_plots
    exit
fi
if [ "${1-}" = bench ]; then
    step "installing matplotlib into .venv" install_plots
    exit
fi
if [[ "${1-}" = image* ]]; then
    exit
fi
step "installing Python packages into .venv" make_venv
if [ "$(id -u)" -eq 0 ] && [[ "$(apt-cache policy user-mode-linux 2>>"$log")" != *Candidate* ]]; then
    step "updating the package lists" apt-get update --quiet
fi
prepare=(.venv/bin/python -m ipsecgate.lab.prepare)

# Install what a test kernel needs besides its own package. $1 is the reason to print; the other
# arguments go to ipsecgate.lab.prepare.
install_for_kernel() {
    local reason=$1 packages
    shift
    mapfile -t packages < <("${prepare[@]}" --packages "$@" 2>>"$log")
    [ "${#packages[@]}" -gt 0 ] || return 0
    if [ "$(id -u)" -ne 0 ]; then
        echo "setup: $reason. Install as root: apt-get install ${packages[*]}" >&2
        exit 1
    fi
    echo "$reason"
    step "installing ${packages[*]}" install_packages "${packages[@]}"
}

install_for_kernel "on this CPU the test kernel needs a small library, which a compiler must build"
if ! step "preparing the test kernel" "${prepare[@]}"; then
    tail -n 25 "$log"
    install_for_kernel "user-mode-linux does not boot here: trying QEMU" --kernel qemu
    step "preparing the test kernel (QEMU)" "${prepare[@]}" --kernel qemu
fi
tail -n 1 "$log"
