package bench

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"

	"golang.org/x/sys/unix"
)

// Placement says which processors the two ends run on, the pair's nodes and
// the raw floor's threads alike.
//
// A blocking round trip is two wake-ups, and what those cost is decided by
// where the threads are: on one processor a wake-up is a change of context; on
// two it is an interrupt for a processor that has gone idle, on a virtual
// machine an exit to the hypervisor more. Left to itself the scheduler settles
// for one or the other, and keeps to it for seconds. Measured with nothing else
// running on 2 virtual processors, 64 bytes over TCP_MD5SIG: bare threads in C
// 17 µs on one processor and 68 to 83 on two; this package's floor 18 to 23 or
// 58 to 77, the pair 32 to 34 or 72 to 78. A pair that happened to be on one
// processor looked twice as fast as a floor that happened to be on two. So a
// ratio of sleeping ends is of ends that were placed.
type Placement string

const (
	// Auto is Apart where one thread at each end does the work, with one
	// committer and one connection, and Free otherwise.
	Auto Placement = "auto"
	// Apart gives each end one half of the processors, as two machines would.
	Apart Placement = "apart"
	// Together gives both ends the same one processor.
	Together Placement = "together"
	// Free leaves it to the scheduler.
	Free Placement = "free"
)

func (p Placement) known() bool {
	return p == "" || p == Auto || p == Apart || p == Together || p == Free
}

// processorsOf are those of each end; nil: no change.
func (p Placement) processorsOf() (of [2][]int, err error) {
	if p == Free {
		return of, nil
	}
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		return of, os.NewSyscallError("sched_getaffinity", err)
	}
	var all []int
	for i := 0; len(all) < set.Count(); i++ {
		if set.IsSet(i) {
			all = append(all, i)
		}
	}
	if p == Together {
		one := all[len(all)-1:]
		return [2][]int{one, one}, nil
	}
	if len(all) < 2 {
		return of, &OptionError{"placement", "there is one processor only: choose together or free"}
	}
	return [2][]int{all[:len(all)/2], all[len(all)/2:]}, nil
}

// place puts this end and the other one, a child, where p says. undo puts both
// back.
func (c *controller) place(p Placement) (undo func() error, err error) {
	of, err := p.processorsOf()
	if err != nil || of[0] == nil {
		return func() error { return nil }, err
	}
	if _, err := c.ask(request{Op: opPlace, Processors: of[1]}); err != nil {
		return nil, err
	}
	here, err := runOn(of[0])
	undo = func() error {
		_, there := c.ask(request{Op: opPlace})
		return errors.Join(here(), there)
	}
	if err != nil {
		return nil, errors.Join(err, undo())
	}
	return undo, nil
}

// runOn moves all threads of this process to some processors. undo moves them
// back.
func runOn(processors []int) (undo func() error, err error) {
	undo = func() error { return nil }
	var before, set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &before); err != nil {
		return undo, os.NewSyscallError("sched_getaffinity", err)
	}
	for _, i := range processors {
		set.Set(i)
	}
	// What is set is not changed any more by the runtime, which would follow
	// the number of processors: with one, a thread that blocks outside of
	// its sight would stop all others.
	runtime.GOMAXPROCS(max(2, runtime.GOMAXPROCS(0)))
	undo = func() error {
		defer runtime.SetDefaultGOMAXPROCS()
		return moveThreads(&before)
	}
	return undo, moveThreads(&set)
}

// moveThreads goes on until it sees no thread that it has not moved: one that
// starts meanwhile has the processors of the thread that started it.
func moveThreads(set *unix.CPUSet) error {
	moved := map[int]bool{}
	for more := true; more; {
		more = false
		tasks, err := os.ReadDir("/proc/self/task")
		if err != nil {
			return err
		}
		for _, t := range tasks {
			tid, err := strconv.Atoi(t.Name())
			if err != nil {
				return fmt.Errorf("/proc/self/task/%s: %w", t.Name(), err)
			}
			if moved[tid] {
				continue
			}
			moved[tid], more = true, true
			if err := unix.SchedSetaffinity(tid, set); err != nil && err != unix.ESRCH {
				return os.NewSyscallError("sched_setaffinity", err)
			}
		}
	}
	return nil
}
