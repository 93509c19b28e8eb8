#!/bin/sh
# Runs every fuzz target for the time given, one after the other.
set -eu
for pkg in $(go list ./...); do
	for f in $(go test -list '^Fuzz' "$pkg" | grep '^Fuzz' || true); do
		echo "== $pkg $f"
		go test -run '^$' -fuzz "^$f\$" -fuzztime "${1:-10s}" "$pkg"
	done
done
