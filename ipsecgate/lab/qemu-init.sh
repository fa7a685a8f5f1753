# Process 1 under QEMU, once the host's files are the root (see qemu.py): finish setting up the
# machine, run one command, power off. guest-init.sh does the same and explains more.
#
# Called as `sh /run/host/init`. /run/host is a folder on the host with
#   settings   input: shell assignments of modules, release, results, terminal, rows, columns
#   command    input: a shell script
#   booted     output: created when the command begins
#   exit-code  output
# The console (ttyS0) carries kernel and init messages, ttyS1 the command's output.
# A step that fails ends process 1, so the kernel panics and the host sees why.
set -eu
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
. /run/host/settings
share=trans=virtio,version=9p2000.L,msize=512000

# Mount /proc first, or mount(8) reads the host's mount list, which shows through, as its own.
mount -t proc proc /proc
echo "
devtmpfs   /dev            devtmpfs  mode=755
devpts     /dev/pts        devpts    mode=620,ptmxmode=666,X-mount.mkdir
tmpfs      /dev/shm        tmpfs     mode=1777,X-mount.mkdir
sysfs      /sys            sysfs     defaults
cgroup2    /sys/fs/cgroup  cgroup2   defaults
bpf        /sys/fs/bpf     bpf       defaults
" >/fstab
mount --all --fstab /fstab
mkdir -p /run/lock /lib/modules "$results"
mount --bind "$modules" /lib/modules
mount -t 9p -o "$share" results "$results"
cp -a /run/host/dev/. /dev
echo guest >/proc/sys/kernel/hostname
ip link set lo up
ulimit -n 65536

exec 3<>/dev/ttyS1
stty raw -opost -echo rows "$rows" cols "$columns" <&3
run='sh /run/host/command; exit $?'
: >/run/host/booted
status=0
if [ "$terminal" = yes ]; then
    setsid --wait sh -c "$run" </dev/null >&3 2>&1 3>&- || status=$?
else
    mkfifo /run/output
    cat /run/output >&3 &
    cat=$!
    setsid --wait sh -c "$run" </dev/null >/run/output 2>&1 3>&- || status=$?
    # A daemon that the command left behind may hold the pipe open: do not wait for it forever.
    (sleep 2 && kill "$cat") &
    wait "$cat" || true
fi
stty raw -opost -echo <&3 # waits until the host has read all output
echo "$status" >/run/host/exit-code
echo o >/proc/sysrq-trigger
while :; do :; done # no sleep(1): the host's files may be gone already, and process 1 must not exit
