//go:build race

package main

const raceDetector = true

// slowdown is what the race detector, and that it is in all the processes that
// a test starts, may cost.
const slowdown = 3
