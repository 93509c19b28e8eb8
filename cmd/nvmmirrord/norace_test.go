//go:build !race

package main

const raceDetector = false

const slowdown = 1
