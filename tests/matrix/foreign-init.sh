# Process 1 of a guest of another architecture. Its root consists of Debian's packages, unpacked but
# not configured, because none of their programs can run on the host. Set up a machine, run one
# command, power off.
#
# Called as `sh /run/host/init`. /run/host is a folder on the host with
#   settings   input: shell assignments of repository, results
#   command    input: a shell script
#   output     output of the command
#   exit-code  output
# A step that fails ends process 1, so the kernel panics and the host sees why.
set -eu
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
. /run/host/settings
share=trans=virtio,version=9p2000.L,msize=512000

mount -t proc proc /proc
mount -t devtmpfs -o mode=755 devtmpfs /dev
mkdir -p /dev/pts /dev/shm /run/lock /run/below /run/upper /run/work "$repository"
mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t tmpfs -o mode=1777 tmpfs /tmp
mount -t sysfs sysfs /sys
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mount -t bpf bpf /sys/fs/bpf
for number in 0 1 2; do
    set -- stdin stdout stderr
    shift "$number"
    ln -s "/proc/self/fd/$number" "/dev/$1"
done
ln -s /proc/self/fd /dev/fd
mount -t 9p -o "$share,cache=loose,ro" repository /run/below
mount -t overlay -o lowerdir=/run/below,upperdir=/run/upper,workdir=/run/work overlay "$repository"
mkdir -p "$results"
mount -t 9p -o "$share" results "$results"
echo guest >/proc/sys/kernel/hostname
ip link set lo up
ulimit -n 65536

status=0
setsid --wait sh /run/host/command </dev/null >/run/host/output 2>&1 || status=$?
echo "$status" >/run/host/exit-code
echo o >/proc/sysrq-trigger
while :; do :; done
