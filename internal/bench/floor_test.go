package bench

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/vishvananda/netns"
)

// The raw floor in Go is that of hack/floor in C: both in turns, in one run.
//
//	BIN=/tmp/floor hack/floor/run.sh build
//	NVMMIRROR_FLOOR=/tmp/floor go test -run TestFloorIsThatOfC -v ./internal/bench
func TestFloorIsThatOfC(t *testing.T) {
	inC := os.Getenv("NVMMIRROR_FLOOR")
	if inC == "" {
		t.Skip("needs the program of hack/floor, named by NVMMIRROR_FLOOR, and a quiet machine")
	}
	const rounds = 7
	c, err := startChild(program(t), netns.None())
	if err != nil {
		t.Fatal(err)
	}
	defer c.end()
	for _, signed := range []bool{false, true} {
		transport, flag := Plain, []string(nil)
		if signed {
			transport, flag = MD5Sig, []string{"-m"}
		}
		s, err := c.open(t.Context(), setup{Transport: transport, Connections: 1, Key: []byte("the-key-of-the-floor")})
		if err != nil {
			t.Fatal(err)
		}
		run := func(w work, d time.Duration) outcome {
			w.Verify = VerifyNone
			r, err := s.run(w, d)
			if err != nil {
				t.Fatal(err)
			}
			return r
		}
		for _, poll := range []bool{true, false} {
			for _, size := range []int{64, 4096} {
				args := append([]string{"pingpong", "-s", fmt.Sprint(size), "-n", "2000"}, flag...)
				if !poll {
					args = append(args, "-b")
				}
				var p50, p99 [2][]float64
				for range rounds {
					f := floorInC(t, inC, args...)
					l := latencyOf(run(work{Size: size, Poll: poll}, 50*time.Millisecond).latency)
					p50[0], p99[0] = append(p50[0], f.P50), append(p99[0], f.P99)
					p50[1], p99[1] = append(p50[1], l.P50), append(p99[1], l.P99)
				}
				compareFloors(t, fmt.Sprintf("%s, %d bytes, polling %v, p50 in µs", transport, size, poll), p50)
				compareFloors(t, fmt.Sprintf("%s, %d bytes, polling %v, p99 in µs", transport, size, poll), p99)
			}
		}
		mib := "512"
		if signed {
			mib = "64"
		}
		var rate [2][]float64
		for range rounds {
			rate[0] = append(rate[0], 1e3*floorInC(t, inC, append([]string{"stream", "-b", "-t", mib}, flag...)...).GB)
			r := run(work{Stream: true, Size: chunk}, 200*time.Millisecond)
			rate[1] = append(rate[1], float64(r.bytes)/1e6/r.took.Seconds())
		}
		compareFloors(t, fmt.Sprintf("%s, stream in MB/s", transport), rate)
		s.close()
	}
}

type floorLine struct {
	P50 float64 `json:"p50_us"`
	P99 float64 `json:"p99_us"`
	GB  float64 `json:"gb_per_s"`
}

func floorInC(t *testing.T, name string, args ...string) (f floorLine) {
	t.Helper()
	out, err := exec.Command(name, args...).Output()
	if err == nil {
		err = json.Unmarshal(out, &f)
	}
	if err != nil {
		t.Fatalf("%s %v: %v: %s", name, args, err, out)
	}
	return f
}

// compareFloors shows medians, and the best that each has reached: on a
// machine that others use, that is what can be compared.
func compareFloors(t *testing.T, what string, of [2][]float64) {
	for i := range of {
		slices.Sort(of[i])
	}
	c, g := of[0], of[1]
	n := len(c)
	t.Logf("%-48s C median %8.2f [%.2f, %.2f]   Go %8.2f [%.2f, %.2f]   ratio of medians %.3f, of lowest %.3f, of highest %.3f",
		what, c[n/2], c[0], c[n-1], g[n/2], g[0], g[n-1], g[n/2]/c[n/2], g[0]/c[0], g[n-1]/c[n-1])
}
