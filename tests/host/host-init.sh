# The last steps before systemd becomes process 1 of the host (see qemu.py for the first ones).
#
# Called as `sh /run/host/init`. /run/host is a folder on the machine that runs QEMU, with
#   settings   input: shell assignments of modules, release, results, terminal, rows, columns
#   command    input: a shell script, whose output goes to ttyS1
#   units      input, copied over the root: the host's own services and their configuration
#   booted     output: created when the command begins
#   exit-code  output
# A step that fails ends process 1, so the kernel panics and its message is shown.
set -eu
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
. /run/host/settings

mount -t proc proc /proc
mkdir -p /lib/modules "$results"
mount --bind "$modules" /lib/modules
mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000 results "$results"
# Mount a private one, because other processes on the machine that runs QEMU write to the shared one.
mount -t tmpfs -o mode=1777 tmpfs /tmp
mkdir -p /var/cache/ipsecgate
mount -t tmpfs -o mode=755 tmpfs /var/cache/ipsecgate
cp -a /run/host/units/. /
: >/etc/fstab
cat >/etc/systemd/system/commands.service <<END
[Unit]
After=basic.target host.service strongswan.service
Requires=host.service strongswan.service
[Service]
Type=oneshot
TimeoutStartSec=infinity
LimitNOFILE=1024:524288
StandardInput=null
ExecStart=/bin/sh -c 'stty -F /dev/ttyS1 raw -opost -echo; : >/run/host/booted; \
    sh /run/host/command >/dev/ttyS1 2>&1; \
    echo \$? >/run/host/status'
ExecStart=/bin/sh -c 'stty -F /dev/ttyS1 raw; mv /run/host/status /run/host/exit-code; \
    echo o >/proc/sysrq-trigger'
END
cat >/etc/systemd/system/commands.target <<END
[Unit]
Requires=basic.target
Wants=commands.service
END
exec env -i PATH="$PATH" /lib/systemd/systemd --unit=commands.target --show-status=yes
