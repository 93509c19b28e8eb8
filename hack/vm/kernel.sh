#!/bin/sh
# Puts Debian's stock kernel into a cache directory, where it is not there yet,
# and prints the directory. Nothing is installed: the package is downloaded and
# unpacked. The kernel is also decompressed, which halves the time that an
# emulated machine takes to boot.
set -eu
PATH=$PATH:/usr/sbin:/sbin
for tool in qemu-system-x86_64 busybox ndctl blkid mkfs.xfs mkfs.ext4 depmod xz dpkg-deb; do
	command -v $tool >/dev/null || {
		echo "hack/vm: no $tool: on Debian for amd64, apt-get install qemu-system-x86 busybox-static ndctl xfsprogs e2fsprogs util-linux kmod xz-utils" >&2
		exit 1
	}
done
cache=${XDG_CACHE_HOME:-$HOME/.cache}/nvmmirror/vm
if [ -e "$cache/kernel/vmlinux" ]; then
	echo "$cache/kernel"
	exit 0
fi
mkdir -p "$cache"
tmp=$(mktemp -d "$cache/new-XXXXXX")
trap 'rm -rf "$tmp"' EXIT
# What the metapackage depends on: the current kernel.
package=$(apt-cache depends linux-image-amd64 | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
[ -n "$package" ] || { echo "hack/vm: apt knows no linux-image-amd64: apt-get update, on Debian for amd64" >&2; exit 1; }
(cd "$tmp" && apt-get download -qq "$package" >&2 || { echo "hack/vm: $package was not downloaded: apt-get update, and look whether the mirror answers" >&2; exit 1; }
	dpkg-deb -x "$package"_*.deb unpacked && rm -f "$package"_*.deb)
mkdir "$tmp/kernel"
release=$(basename "$tmp"/unpacked/boot/vmlinuz-*)
release=${release#vmlinuz-}
# Debian's kernels before 6.12 have their modules in /lib, later ones in /usr/lib.
modules=$(find "$tmp/unpacked" -type d -path "*/modules/$release" | head -n 1)
mkdir -p "$tmp/kernel/lib/modules"
mv "$modules" "$tmp/kernel/lib/modules/$release"
mv "$tmp/unpacked/boot/vmlinuz-$release" "$tmp/kernel/vmlinuz"
depmod -b "$tmp/kernel" "$release"
# The compressed kernel inside the image begins with xz's magic. What follows
# it in the image is not xz: that error is expected, another result is not.
at=$(LC_ALL=C grep -abo "$(printf '\3757zXZ')" "$tmp/kernel/vmlinuz" | head -n 1 | cut -d: -f1)
if [ -n "$at" ]; then
	tail -c "+$((at + 1))" "$tmp/kernel/vmlinuz" | xz -dc >"$tmp/vmlinux" 2>/dev/null || true
fi
if [ "$(head -c 4 "$tmp/vmlinux" 2>/dev/null)" = "$(printf '\177ELF')" ]; then
	mv "$tmp/vmlinux" "$tmp/kernel/vmlinux"
else
	ln "$tmp/kernel/vmlinuz" "$tmp/kernel/vmlinux" # QEMU boots that too, later
fi
mv -T "$tmp/kernel" "$cache/kernel" 2>/dev/null || [ -e "$cache/kernel/vmlinux" ]
echo "$cache/kernel"
