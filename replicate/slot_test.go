package replicate

import (
	"testing"
	"time"
)

func TestRefusalsAreLoggedOnceASecond(t *testing.T) {
	var r refusals
	for i, c := range []struct {
		at     time.Duration
		reason string
		quiet  int
		due    bool
	}{
		{0, "type 77", 0, true},
		{time.Millisecond, "magic", 0, false},
		{time.Second - 1, "magic", 0, false},
		{time.Second, "magic", 2, true},
		{3 * time.Second, "closed", 0, true},
		{3*time.Second + 1, "magic", 0, false},
		{5 * time.Second, "magic", 1, true},
		// The same, figures aside.
		{7 * time.Second, "type 78", 0, true},
		{10 * time.Second, "type 79", 0, false},
		{67*time.Second - 1, "type 79", 0, false},
		{67 * time.Second, "type 79", 2, true},
	} {
		if quiet, due := r.add(c.at, c.reason); quiet != c.quiet || due != c.due {
			t.Errorf("%d, %q at %v: %d, %v", i, c.reason, c.at, quiet, due)
		}
	}
}
