#!/bin/busybox sh
# The guest's first process, from the initramfs: the host's files as root,
# read-only, with a tmpfs over them, and then a shell that the host drives.
bb=/bin/busybox
$bb mount -t proc proc /proc
$bb mount -t devtmpfs dev /dev
for module in $($bb cat /modules); do
	$bb insmod "/$module" || $bb echo "insmod $module failed"
done
$bb mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=loose,ro root /lower
$bb mount -t tmpfs tmpfs /upper
$bb mkdir /upper/files /upper/work
$bb mount -t overlay -o lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work overlay /root
cd /root
$bb mount --move /proc proc
$bb mount --move /dev dev
$bb mount -t sysfs sysfs sys
$bb mount -t tmpfs tmpfs run
$bb mkdir -p dev/shm
$bb mount -t tmpfs tmpfs dev/shm
$bb cp /agent.sh run/agent.sh
exec $bb switch_root /root /bin/sh /run/agent.sh <dev/ttyS1 >dev/ttyS1 2>&1
