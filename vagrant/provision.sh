#!/bin/bash
# Set up a Debian host as one of two: the gate, which runs ipsecgate, or the peer that it talks to.
#
# provision.sh gate PEER-ADDRESS [KEY]   install strongSwan, ipsecgate from this checkout, a gated service
# provision.sh peer GATE-ADDRESS [KEY]   install strongSwan and a web server
# provision.sh packages                  print the packages that it installs
#
# Vagrant runs this (see Vagrantfile). It also works by hand on any two hosts with Debian 12 or newer
# that can reach each other: as root, with the checkout on the gate and vagrant/ on the peer. KEY is
# the IKE secret, the same on both; the default is for tests only. Missing packages are installed with
# apt and pip. It is safe to run again.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
export DEBIAN_FRONTEND=noninteractive PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore

packages=(
    charon-systemd strongswan-swanctl  # IKE
    python3-bpfcc python3-venv make    # ipsecgate, and its installation
    curl iproute2 tcpdump              # first-connection
)

say() { printf '%s\n' "== $*"; }

install_packages() {
    local package missing=()
    for package in "${packages[@]}"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
            missing+=("$package")
    done
    [ "${#missing[@]}" -gt 0 ] || return 0
    say "installing ${missing[*]}"
    apt-get update --quiet --quiet
    apt-get install --yes --quiet --quiet --no-install-recommends "${missing[@]}"
}

# strongSwan: one transport-mode connection between the two addresses. The gate has a trap, as usual:
# without ipsecgate the first packet makes the kernel request the SA, and is lost.
configure_ike() {
    local role=$1 other=$2 address=$3 key=$4 start
    case "$role" in gate) start="trap" ;; peer) start="none" ;; esac
    say "configuring strongSwan: $role, with $other at $address"
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

# `make install` needs pip from a virtual environment. Make a temporary one, because that of `make setup`
# would install developers' tools.
install_gate() {
    local venv
    venv=$(mktemp -d)
    say "installing ipsecgate from ${here%/*}"
    python3 -m venv --system-site-packages "$venv"
    "$venv/bin/pip" install --quiet --constraint "${here%/*}/constraints.txt" "${here%/*}"
    make --silent --directory "${here%/*}" --old-file=setup install BIN="$venv/bin"
    rm -rf "$venv"
}

configure_gate() {
    say "configuring ipsecgate: enforce for web-proxy.service"
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
    say "starting a web server on port 8000"
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
