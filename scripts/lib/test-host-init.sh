#!/bin/sh
# /init of the test host's initramfs (busybox): assembles the machine the
# command will see, then hands over to PID 1 proper.
#
# The root is this machine's root, read-only by 9p, under a tmpfs overlay.
set -e
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys

# Not to wait for RCU grace periods while modules load and file systems mount.
echo 1 >/sys/kernel/rcu_expedited

while read -r m; do
  case $m in
    kvm-amd.ko) grep -qw svm /proc/cpuinfo || continue ;;
    kvm-intel.ko) grep -qw vmx /proc/cpuinfo || continue ;;
  esac
  insmod "/modules/$m" || echo "test host: module $m did not load"
done </modules/order

mkdir -p /host /rw /root
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=512000,cache=loose host /host
mount -t tmpfs -o size=75%,mode=755 rw /rw
mkdir /rw/upper /rw/work
mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work,xino=off root /root

mount --move /dev /root/dev
mount --move /proc /root/proc
mount --move /sys /root/sys
cd /root
mkdir -p dev/pts dev/shm dev/mqueue
mount -t devpts -o mode=620,gid=5,ptmxmode=666 devpts dev/pts
mount -t tmpfs -o mode=1777 shm dev/shm
mount -t mqueue mqueue dev/mqueue
for l in fd stdin:fd/0 stdout:fd/1 stderr:fd/2; do
  ln -sf "/proc/self/${l#*:}" "dev/${l%%:*}"
done
# Nodes that load their module when opened.
mkdir -p dev/net
for n in net/tun:10:200 fuse:10:229 loop-control:10:237; do
  IFS=: read -r name major minor <<END
$n
END
  [ -e "dev/$name" ] || mknod -m 666 "dev/$name" c "$major" "$minor"
done
mount -t cgroup2 cgroup2 sys/fs/cgroup
sed 's/[^ ]*/+&/g' sys/fs/cgroup/cgroup.controllers >sys/fs/cgroup/cgroup.subtree_control
mount -t tmpfs -o mode=755 run run
mkdir -p run/lock
mount -t tmpfs -o mode=1777 tmp tmp

# shellcheck source=/dev/null
. "/host$(sed 's/.*th.dir=\([^ ]*\).*/\1/' proc/cmdline)/mounts"

hostname test-host
ip link set lo up
echo 1 >proc/sys/net/ipv4/ip_forward
mkdir -p run/test-host "lib/modules/$(uname -r)"
cp "/host$TH_DIR"/argv "/host$TH_DIR"/env "/host$TH_DIR"/settings /pid1 run/test-host
mount --bind "/host$TH_MODULES" "lib/modules/$(uname -r)"

# Directories the command needs that our own /tmp or /run has hidden.
for d in $TH_KEEP; do
  case $d in /tmp/* | /run/*) ;; *) continue ;; esac
  n=$(echo "$d" | tr / _)
  mkdir -p "root$d" "/rw/$n" "/rw/$n.work" "/root$d"
  mount -t overlay -o "lowerdir=/host$d,upperdir=/rw/$n,workdir=/rw/$n.work,xino=off" keep "/root$d"
done
if [ -n "$TH_NETWORK" ]; then # QEMU's user network
  chroot /root modprobe virtio_net
  ip link set eth0 up
  ip address add 10.0.2.15/24 dev eth0
  ip route add default via 10.0.2.2
  rm -f /root/etc/resolv.conf
  echo nameserver 10.0.2.3 >/root/etc/resolv.conf
fi
if [ -n "$TH_OUT" ]; then
  mkdir -p "/root$TH_OUT"
  mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none out "/root$TH_OUT"
fi

# containerd's directories must not lie on an overlay: overlayfs refuses one as
# its upper directory.
if [ -b /root/dev/vda ]; then
  mkdir -p /scratch
  mount -t ext4 -o noatime /root/dev/vda /scratch
else
  mkdir -p /scratch
  mount -t tmpfs -o size=75% scratch /scratch
fi
for d in containerd vmshim cni; do
  mkdir -p "/scratch/$d" "/root/var/lib/$d"
  mount --bind "/scratch/$d" "/root/var/lib/$d"
done

echo 0 >/root/sys/kernel/rcu_expedited

# Not chroot: a mount namespace entered later would land in the initramfs.
exec switch_root /root /run/test-host/pid1 <dev/null
