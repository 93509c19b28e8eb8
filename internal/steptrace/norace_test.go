//go:build amd64 && !race

package steptrace

const raceEnabled = false
