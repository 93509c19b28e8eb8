#!/bin/sh
# Puts each fault of testdata/pairsim-faults into a copy of the tree and runs
# schedules of the simulated pair, from seed 1 on, until one breaks a promise.
# Prints the table of docs/TESTING.md. Fails where a patch does not apply or
# does not compile, and where as many schedules as make test runs all pass.
#
#	hack/pairsim-faults.sh [name ...]
set -eu
cd "$(dirname "$0")/.."
top=$PWD
tmp=$(mktemp -d)
trap 'rm -rf "$tmp"' EXIT
trap 'exit 1' INT TERM
[ $# -gt 0 ] || set -- $(cd testdata/pairsim-faults && ls | sed 's/\.patch$//')
mkdir "$tmp/tree"
git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$tmp/tree"
cd "$tmp/tree"
failed=0
echo '| fault | seed | caught by |'
echo '|---|---|---|'
for name; do
	patch=$top/testdata/pairsim-faults/$name.patch
	if ! git apply "$patch"; then
		echo "$name does not apply" >&2
		failed=1
		continue
	fi
	# One worker, so that the first seed is the first. The failure is told as
	# "seed N: what".
	if ! ${GO:-go} test -c -o ../test . >../out 2>&1; then
		cat ../out >&2
		echo "$name does not compile" >&2
		failed=1
	elif taskset -c 0 ../test -test.run '^TestPairSim$' >../out 2>&1; then
		echo "$name is not caught" >&2
		failed=1
	else
		what=$(sed -n 's/.*: seed \([0-9]*\): \(.*\)/\1 | \2/p' ../out | head -1 | cut -c1-160)
		if [ -z "$what" ]; then
			cat ../out >&2
			echo "$name: no seed is named" >&2
			failed=1
		fi
		echo "| $(head -1 "$patch") | $what |"
	fi
	git apply -R "$patch"
done
exit $failed
