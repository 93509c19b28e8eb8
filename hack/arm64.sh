#!/bin/sh
# Runs the tests of crc32c, pmem, journal and the volume for arm64 under qemu-user
# (Debian: qemu-user-static). It has no TCP_MD5SIG and cannot start a second
# process of a foreign architecture, so what needs those skips.
set -eu
qemu=$(command -v qemu-aarch64-static || command -v qemu-aarch64) || { echo "no qemu-aarch64: install qemu-user-static"; exit 1; }
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
for pkg in internal/crc32c pmem journal .; do
	echo "== arm64: $pkg"
	CGO_ENABLED=0 GOARCH=arm64 go test -c -o "$tmp/t" "./$pkg"
	if ! (cd "$pkg" && "$qemu" -cpu max "$tmp/t" -test.short -test.timeout 10m) >"$tmp/out" 2>&1; then
		cat "$tmp/out"
		exit 1
	fi
	tail -n 1 "$tmp/out"
done
