package chaos

import (
	"cmp"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/nvmmirror/nvmmirror/internal/faultwire"
)

// What the environment may say.
const (
	envFull = "NVMMIRROR_TEST_ROOT"  // set: at full length; allDone: not at all
	envSeed = "NVMMIRROR_CHAOS_SEED" // repeats a run's choices
	envTime = "NVMMIRROR_CHAOS_TIME" // how long TestChaosBlock goes on at least, and TestChaosAlone a quarter of it
)

// allDone says that these tests have just run at full length, so that a run of
// everything need not repeat them.
const allDone = "done"

// program is the daemon, built once.
var program string

func TestMain(m *testing.M) {
	os.Exit(func() int {
		if os.Geteuid() == 0 {
			dir, err := os.MkdirTemp("", "nvmmirror-chaos-bin-")
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
			defer os.RemoveAll(dir)
			program = filepath.Join(dir, "nvmmirrord")
			out, err := exec.Command("go", "build", "-buildvcs=false", "-o", program, "github.com/nvmmirror/nvmmirror/cmd/nvmmirrord").CombinedOutput()
			if err != nil {
				fmt.Fprintf(os.Stderr, "building the daemon: %v\n%s", err, out)
				return 1
			}
		}
		code := m.Run()
		if code == 0 {
			if err := goleak.Find(); err != nil {
				fmt.Fprintln(os.Stderr, err)
				code = 1
			}
		}
		return code
	}())
}

// full reports whether this is a run of full length.
func full() bool { return os.Getenv(envFull) != "" }

// sized is how much of something to do.
func sized(whole, brief int) int {
	if full() {
		return whole
	}
	return brief
}

// needWire makes a wire that ends with the test, or skips where it may not.
func needWire(t *testing.T, seed uint64) *faultwire.Wire {
	t.Helper()
	switch {
	case testing.Short():
		t.Skip("skipped: -short; make test-root runs this")
	case os.Getenv(envFull) == allDone:
		t.Skipf("skipped: %s=%s: make test-root has run it", envFull, allDone)
	}
	w, err := faultwire.New(faultwire.Config{Seed: seed})
	if errors.Is(err, faultwire.ErrNotPermitted) {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, d := range []*faultwire.Direction{w.AtoB, w.BtoA} {
			if err := d.Err(); err != nil {
				t.Errorf("%v ended by itself: %v", d, err)
			}
		}
		if err := w.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return w
}

// seedOf is the run's seed: drawn, unless the environment says.
func seedOf(t *testing.T) uint64 {
	t.Helper()
	seed := rand.Uint64()
	if text := os.Getenv(envSeed); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("%s: %v", envSeed, err)
		}
	}
	seed = cmp.Or(seed, 1)
	t.Logf("seed %d: repeat the choices with %s=%d", seed, envSeed, seed)
	return seed
}

// poll calls done until it holds, or fails the test after limit with what it
// said last.
func poll(t testing.TB, limit time.Duration, what string, done func() (bool, string)) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		ok, state := done()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s; now: %s", limit, what, state)
		}
		time.Sleep(2 * time.Millisecond)
	}
}
