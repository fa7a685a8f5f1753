# The guest's process 1: set up a machine from the host's files, run one command, power off.
#
# The second part of WORK/init; uml-root.sh is the first. WORK is a folder on the host with
#   settings   input: shell assignments of modules, release, results, terminal, rows, columns
#   command    input: a shell script
#   booted     output: created when the command begins
#   exit-code  output
# The console carries kernel and init messages, /dev/tty1 the command's output.

# Make all mounts in one process: starting one costs 50 ms here. Mount /proc first, or mount(8) reads
# the host's mount list, which shows through, as its own.
mount -t proc proc /proc
echo "
devtmpfs   /dev            devtmpfs  mode=755
devpts     /dev/pts        devpts    mode=620,ptmxmode=666,X-mount.mkdir
tmpfs      /dev/shm        tmpfs     mode=1777,X-mount.mkdir
tmpfs      /run            tmpfs     mode=755
sysfs      /sys            sysfs     defaults
cgroup2    /sys/fs/cgroup  cgroup2   defaults
bpf        /sys/fs/bpf     bpf       defaults
host       /run/host       hostfs    $work,X-mount.mkdir
" >/fstab
mount --all --fstab /fstab
umount -l /mnt
mkdir -p /run/lock /lib/modules "$results"
mount --bind "$modules" /lib/modules
mount -t hostfs -o "$results" results "$results"
cp -a /run/host/dev/. /dev
echo guest >/proc/sys/kernel/hostname
ip link set lo up
ulimit -n 65536

# Pass bytes on unchanged (no CR before LF). The command gets a terminal only if the caller has one,
# and never as its controlling terminal (only a session leader, the outer sh, could acquire it): the
# hang-up at the end would drop pending output.
exec 3<>/dev/tty1
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
    # A daemon that the command left behind may hold the pipe open, so cat would never see its end.
    for holder in $(find /proc/[0-9]*/fd -lname /run/output 2>/dev/null); do
        holder=${holder#/proc/}
        [ "${holder%%/*}" = "$cat" ] || kill -9 "${holder%%/*}" 2>/dev/null || true
    done
    wait "$cat" || true
fi
stty -F /dev/tty1 raw -opost -echo # waits until the host has read all output
echo "$status" >/run/host/exit-code
echo o >/proc/sysrq-trigger
sleep 60
