#!/bin/sh
# Runs every fuzz target for the time given, one after the other. Finding
# shorter inputs for what is merely new is kept short: it takes for ever where
# coverage is not the same twice, as with sockets.
set -eu
for pkg in $(go list ./...); do
	for f in $(go test -list '^Fuzz' "$pkg" | grep '^Fuzz' || true); do
		echo "== $pkg $f"
		go test -run '^$' -fuzz "^$f\$" -fuzztime "${1:-10s}" -fuzzminimizetime 20x "$pkg"
	done
done
