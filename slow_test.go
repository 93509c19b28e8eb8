package nvmmirror

import (
	"os"
	"strconv"
	"time"
)

// slowEnv says how many times slower than usual this machine is: whoever runs
// the tests in an emulated one knows.
const slowEnv = "NVMMIRROR_TEST_SLOW"

// slow is d, for deadlines and timeouts of peers, on such a machine.
func slow(d time.Duration) time.Duration {
	if f, err := strconv.ParseFloat(os.Getenv(slowEnv), 64); err == nil && f > 1 {
		return time.Duration(float64(d) * f)
	}
	return d
}
