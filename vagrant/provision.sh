#!/bin/bash
# Make a Debian host one of two: the gate, which runs ipsecgate, or the peer, which it talks to.
#
# provision.sh gate PEER-ADDRESS [KEY]   strongSwan, ipsecgate from this checkout, and a gated service
# provision.sh peer GATE-ADDRESS [KEY]   strongSwan and a web server
# provision.sh packages                  print the packages that both install
#
# Vagrant calls it (see Vagrantfile). By hand it takes any two Debian 12 or newer hosts that reach
# each other, as root, with the checkout on the gate and vagrant/ on the peer. KEY is the IKE secret,
# the same on both; the default is for tests. It may be run again: it changes only what differs.
# Packages come by apt and pip, if they are not there.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

packages=(
    charon-systemd strongswan-swanctl  # IKE
    python3-bpfcc python3-venv make    # ipsecgate, and its installation
    curl iproute2 tcpdump              # what is shown
)

say() { printf '%s\n' "== $*"; }

install_packages() {
    local package missing=()
    for package in "${packages[@]}"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            missing+=("$package")
    done
    [ "${#missing[@]}" -gt 0 ] || return 0
    say "packages: ${missing[*]}"
    apt-get update --quiet --quiet
    apt-get install --yes --quiet --quiet --no-install-recommends "${missing[@]}"
}

# strongSwan: one connection, transport mode between the two addresses. The gate has a trap, as is
# usual: without ipsecgate the first packet makes the kernel ask for the SA, and is lost.
configure_ike() {
    local role=$1 other=$2 address=$3 key=$4 start
    case "$role" in gate) start="trap" ;; peer) start="none" ;; esac
    say "strongSwan: $role, with $other at $address"
    install -m 600 /dev/stdin /etc/swanctl/conf.d/ipsecgate.conf <<END
connections {
  $other {
    version = 2
    remote_addrs = $address
    local {
      auth = psk
      id = $role
    }
    remote {
      auth = psk
      id = $other
    }
    children {
      $other {
        mode = transport
        start_action = $start
      }
    }
  }
}
secrets {
  ike-ipsecgate {
    id-1 = $role
    id-2 = $other
    secret = "$key"
  }
}
END
    systemctl enable --quiet strongswan.service
    systemctl restart strongswan.service
}

name_the_other() {
    local line="$2 $1"
    grep -qxF "$line" /etc/hosts || echo "$line" >>/etc/hosts
}

# `make install` takes pip from a virtual environment. One for this purpose only has no tools of
# developers, which `make setup` would bring.
install_gate() {
    local venv
    venv=$(mktemp -d)
    say "ipsecgate from ${here%/*}"
    python3 -m venv --system-site-packages "$venv"
    "$venv/bin/pip" install --quiet --constraint "${here%/*}/constraints.txt" "${here%/*}"
    make --silent --directory "${here%/*}" --old-file=setup install BIN="$venv/bin"
    rm -rf "$venv"
}

configure_gate() {
    say "the gate: enforces for web-proxy.service"
    install -d /etc/ipsecgate
    install -m 644 /dev/stdin /etc/ipsecgate/ipsecgate.toml <<END
[gate]
mode = "enforce"
cgroups = ["unit:web-proxy"]

[[policy]]
name = "peer"
remote = ["$1"]
action = "protect"
END
    install -m 644 "$here"/systemd/web-proxy.* /etc/systemd/system/
    install -m 755 "$here/first-connection" /usr/local/bin/
    systemctl daemon-reload
    say "compiling the hooks (once)"
    ipsecgate load
    systemctl enable --quiet ipsecgate-load.service ipsecgate.service web-proxy.socket web-proxy.service
    systemctl restart ipsecgate-load.service ipsecgate.service web-proxy.socket web-proxy.service
}

serve() {
    say "a web server at port 8000"
    install -D -m 644 /dev/stdin /srv/web/index.html <<<"hello from the peer"
    install -m 644 "$here/systemd/web.service" /etc/systemd/system/
    systemctl daemon-reload
    systemctl enable --quiet web.service
    systemctl restart web.service
}

case "${1-}" in
    packages) printf '%s\n' "${packages[@]}"; exit ;;
    gate) other=peer ;;
    peer) other=gate ;;
esac
if [ -z "${other-}" ] || [ -z "${2-}" ]; then
    sed -n '/^# provision/s/^# //p' "$0" >&2
    exit 2
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "provision: run it as root" >&2
    exit 1
fi
install_packages
name_the_other "$other" "$2"
configure_ike "$1" "$other" "$2" "${3:-for tests only}"
if [ "$1" = gate ]; then
    install_gate
    configure_gate "$2"
else
    serve
fi
say "$1 is ready after $SECONDS s"
