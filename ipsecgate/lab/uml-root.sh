# The first steps of process 1 in user-mode-linux: the host's files become the root.
#
# Called as `sh WORK/init WORK`, where WORK is a folder on the host and WORK/settings assigns modules
# and release. It is the first part of WORK/init; the second part continues in the new root.
# A step that fails ends process 1, so the kernel panics and the host sees why.
set -eu
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
# hostfs takes its folder as mount(2)'s data; the new mount API rejects an option that is only a path.
export LIBMOUNT_FORCE_MOUNT2=always
work=$1
. "$work/settings"

# The root is the host's, read-only. Put a tmpfs above it and make both the root with pivot_root:
# under a plain chroot, container runtimes would see the host's files below.
mount -t tmpfs -o mode=755,size=90% tmpfs /mnt
mkdir /mnt/upper /mnt/work /mnt/root
insmod "$modules/$release/kernel/fs/overlayfs/overlay.ko"
mount -t overlay -o lowerdir=/,upperdir=/mnt/upper,workdir=/mnt/work overlay /mnt/root
cd /mnt/root
pivot_root . mnt
cd /
