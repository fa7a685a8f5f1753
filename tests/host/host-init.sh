# The last steps before systemd becomes process 1 of the host, whose root is this machine's files
# with a layer in memory (uml-root.sh and qemu.py make it).
#
# Run by process 1. /run/host is a folder on the machine that runs the host, with
#   settings   input: shell assignments of modules, release, checkout, results, share (the file system
#              for folders of that machine) and output (the terminal for the command's output)
#   command    input: a shell script
#   units      input, copied over the root: the host's own services and their configuration
#   booted     output: created when the command begins
#   exit-code  output
# A step that fails ends process 1, so the kernel panics and its message is shown.
set -eu
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
. "${work-/run/host}/settings"

mount -t proc proc /proc
case $share in
    hostfs) # the root is all that user-mode-linux has so far
        umount -l /mnt
        mount -t tmpfs -o mode=755 tmpfs /run
        mkdir /run/host
        mount -t hostfs -o "$work" work /run/host
        options=$results ;;
    9p) options=trans=virtio,version=9p2000.L,msize=512000 ;;
esac
mkdir -p /lib/modules
mount --bind "$modules" /lib/modules
# Mount a private /tmp, because other processes on the machine that runs this write to the shared one;
# but keep the checkout.
mkdir /run/checkout
mount --bind "$checkout" /run/checkout
mount -t tmpfs -o mode=1777 tmpfs /tmp
mkdir -p "$checkout" "$results"
mount --move /run/checkout "$checkout"
mount -t "$share" -o "$options" results "$results"
mkdir -p /var/cache/ipsecgate
mount -t tmpfs -o mode=755 tmpfs /var/cache/ipsecgate
# The kernel loads these for the tests. They stay loaded with their devices, sysctls and processes, so
# the first state must have them.
modprobe --all --quiet ip_gre ipip ip_vti ip6_tunnel ip6_vti nf_conntrack vrf bpfilter || :
# Likewise, copy /etc; a folder that takes the place of a removed one hides what is below the layer.
cp -a /etc /etc.copy
rm -rf /etc
mv /etc.copy /etc
cp -a /run/host/units/. /
ln -s /dev/null /etc/systemd/system/timers.target # this machine's periodic jobs
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
ExecStart=/bin/sh -c 'stty -F $output raw -opost -echo; : >/run/host/booted; \
    sh /run/host/command >$output 2>&1; \
    echo \$? >/run/host/status'
ExecStart=/bin/sh -c 'stty -F $output raw; mv /run/host/status /run/host/exit-code; \
    echo o >/proc/sysrq-trigger'
END
cat >/etc/systemd/system/commands.target <<END
[Unit]
Requires=basic.target
Wants=commands.service
END
exec env -i PATH="$PATH" /lib/systemd/systemd --unit=commands.target --show-status=yes
