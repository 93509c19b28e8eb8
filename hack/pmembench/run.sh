#!/bin/sh
# On tmpfs: persist by size against libpmem's pmem_memcpy_persist, and the
# journal's append (one fence, checksums included) against libpmemlog's.
#
#	apt-get install -y gcc libpmem-dev libpmemlog-dev
#	hack/pmembench/run.sh [ROUNDS] [SECONDS]
#
# Rounds alternate between the two, so that drift of the machine meets both;
# the medians of the rounds are printed in ns per operation, and their ratio,
# then the best rounds and theirs: on a machine that is not quiet only the best
# say something, because what disturbs never makes a round faster.
set -eu
rounds=${1:-7}
seconds=${2:-0.2}
here=$(cd "$(dirname "$0")" && pwd)
work=$(mktemp -d)
pool=$(mktemp -d /dev/shm/pmembench-XXXXXX)
trap 'rm -rf "$work" "$pool"' EXIT INT TERM

gcc -O2 -Wall -o "$work/persist" "$here/persist.c" -lpmem -lpmemlog
(cd "$here/../.." && go test -c -o "$work/go" ./pmem && go test -c -o "$work/journal" ./journal)

# libpmem flushes lines with CPU instructions only where it takes the mapping
# for persistent memory; on tmpfs it would msync.
export PMEM_IS_PMEM_FORCE=1

sizes="64 256 4096 65536 1048576"
i=0
while [ "$i" -lt "$rounds" ]; do
	for size in $sizes; do
		"$work/persist" memcpy "$pool" "$size" "$seconds" >>"$work/memcpy.$size"
		(cd "$here/../../pmem" && "$work/go" -test.run '^$' -test.cpu 1 -test.bench "^BenchmarkPersist\$/^$size\$" -test.benchtime "${seconds}s") |
			awk '/ns\/op/ { print $3; n++ } END { exit !n }' >>"$work/go.$size"
	done
	for size in 64 4096; do
		"$work/persist" append "$pool" "$size" "$seconds" >>"$work/append.$size"
		(cd "$here/../../journal" && "$work/journal" -test.run '^$' -test.cpu 1 -test.bench "^BenchmarkAppend\$/^$size\$" -test.benchtime "${seconds}s") |
			awk '/ns\/op/ { print $3; n++ } END { exit !n }' >>"$work/journal.$size"
	done
	i=$((i + 1))
done

median() {
	sort -n "$1" | awk '{ v[NR] = $1 } END { print (v[int((NR + 1) / 2)] + v[int(NR / 2) + 1]) / 2 }'
}

best() {
	sort -n "$1" | head -1
}

ratio() {
	awk "BEGIN { printf \"%.3f\", $1 / $2 }"
}

table() { # heading, sizes, files of C, files of Go
	printf '%-8s %8s  %10s %10s %6s  %10s %10s %6s\n' "$1" bytes C Go ratio 'best: C' Go ratio
	for size in $2; do
		c=$(median "$work/$3.$size") go=$(median "$work/$4.$size")
		cb=$(best "$work/$3.$size") gob=$(best "$work/$4.$size")
		printf '%-8s %8d  %10s %10s %6s  %10s %10s %6s\n' '' "$size" "$c" "$go" "$(ratio "$go" "$c")" "$cb" "$gob" "$(ratio "$gob" "$cb")"
	done
}
table persist "$sizes" memcpy go
table append "64 4096" append journal
