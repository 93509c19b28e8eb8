package bench

import (
	"fmt"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// Each thread is where it was put, those that start later too, and goes back.
func TestPlacement(t *testing.T) {
	if runtime.NumCPU() < 2 {
		t.Skip("needs two processors")
	}
	before := affinities(t)
	of, err := Apart.processorsOf()
	if err != nil {
		t.Fatal(err)
	}
	for _, cpu := range of[0] {
		for _, other := range of[1] {
			if cpu == other {
				t.Fatalf("both ends have processor %d", cpu)
			}
		}
	}
	undo, err := runOn(of[0])
	if err != nil {
		t.Fatal(err)
	}
	hold, held := make(chan struct{}), make(chan struct{})
	go func() {
		runtime.LockOSThread() // a thread of its own
		close(held)
		<-hold
	}()
	<-held
	for tid, set := range affinities(t) {
		for _, cpu := range of[1] {
			if set.IsSet(cpu) {
				t.Errorf("thread %d may run on %d", tid, cpu)
			}
		}
	}
	close(hold)
	if err := undo(); err != nil {
		t.Fatal(err)
	}
	for tid, set := range affinities(t) {
		if was, ok := before[tid]; ok && was != set {
			t.Errorf("thread %d is not where it was", tid)
		}
	}
}

func affinities(t *testing.T) map[int]unix.CPUSet {
	t.Helper()
	tasks, err := os.ReadDir("/proc/self/task")
	if err != nil {
		t.Fatal(err)
	}
	of := map[int]unix.CPUSet{}
	for _, task := range tasks {
		var tid int
		if _, err := fmt.Sscan(task.Name(), &tid); err != nil {
			t.Fatal(err)
		}
		var set unix.CPUSet
		if unix.SchedGetaffinity(tid, &set) == nil { // it may have ended
			of[tid] = set
		}
	}
	return of
}
