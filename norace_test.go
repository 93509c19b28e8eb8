//go:build !race

package nvmmirror

const raceEnabled = false
