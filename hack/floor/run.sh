#!/bin/sh
# Builds the raw programs and measures the floor on loopback: one JSON object
# a line. Wants a quiet machine with two cores. BIN=/path keeps the binary.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
if [ -n "${BIN:-}" ]; then
	bin=$BIN
else
	tmp=$(mktemp -d)
	trap 'rm -rf "$tmp"' EXIT
	bin=$tmp/floor
fi
${CC:-cc} -O2 -Wall -Wextra -o "$bin" "$here/floor.c" -lpthread
[ "${1:-}" = build ] && exit 0
for md5 in "" -m; do
	for size in 64 4096; do
		"$bin" pingpong -s $size -n 20000 $md5
		"$bin" pingpong -s $size -n 5000 -b $md5
	done
	mib=4096
	[ -z "$md5" ] || mib=512
	for conns in 1 2; do
		"$bin" stream -k $conns -t $mib -b $md5
	done
done
