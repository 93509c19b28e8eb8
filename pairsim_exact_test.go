package nvmmirror

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// startSimulation starts a process that simulates pairs: exactly where that is
// possible, and nice.
func startSimulation(cmd *exec.Cmd) error {
	start := startExactly
	if exactly() != nil {
		start = (*exec.Cmd).Start
	}
	if err := start(cmd); err != nil {
		return err
	}
	nice(cmd)
	return nil
}

// exactly is why startExactly does not work here: ptrace can be forbidden, and
// qemu-user has none.
var exactly = sync.OnceValue(func() error {
	if raceEnabled {
		return errors.New("the race detector shuffles the goroutines that can run")
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, "-test.run=^$")
	if err := startExactly(cmd); err != nil {
		return err
	}
	return cmd.Wait()
})

// startExactly starts a Go program whose runtime takes the same choices each
// time. What the runtime draws (the case of a select, the order of a map) comes
// from the 16 random bytes that the kernel gives a program (AT_RANDOM): they are
// replaced. Its monitor (sysmon), which takes the processor from goroutines by
// how much real time has passed, is the first thread that the program starts:
// that stays where it is born, stopped, until the program ends. The few other
// threads, which meet while the program starts, take turns on one CPU: where they
// contend for a lock of the runtime, it draws.
//
// With GOMAXPROCS=1, no asynchronous preemption, fake time, and no collection, the
// rest follows from what the program does. A thread that loses its CPU to another
// program just as it holds a lock of the runtime, in the microseconds in which the
// others are awake, can still be met.
func startExactly(cmd *exec.Cmd) error {
	if cmd.SysProcAttr == nil {
		cmd.SysProcAttr = &syscall.SysProcAttr{}
	}
	cmd.SysProcAttr.Ptrace = true
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // for good: the tracer is a thread, and goes with the program
		if err := cmd.Start(); err != nil {
			started <- err
			return
		}
		monitor, err := freezeMonitor(cmd.Process.Pid)
		if err != nil {
			cmd.Process.Kill()
			cmd.Wait()
			started <- fmt.Errorf("ptrace: %w", err)
			return
		}
		started <- nil
		for { // a program has ended when all its threads are taken note of
			var ws unix.WaitStatus
			if _, err := unix.Wait4(monitor, &ws, unix.WALL, nil); err == unix.EINTR {
				continue
			} else if err != nil || ws.Exited() || ws.Signaled() {
				return
			}
		}
	}()
	return <-started
}

// freezeMonitor leads a program, stopped at its first instruction, to the start
// of its first thread.
func freezeMonitor(pid int) (thread int, err error) {
	if ws, err := waitStopped(pid); err != nil || ws.StopSignal() != unix.SIGTRAP {
		return 0, fmt.Errorf("not stopped at its start: %v, %w", ws, err)
	}
	auxv, err := os.ReadFile(fmt.Sprintf("/proc/%d/auxv", pid))
	if err != nil {
		return 0, err
	}
	random := uintptr(0)
	for ; len(auxv) >= 16; auxv = auxv[16:] {
		if binary.NativeEndian.Uint64(auxv) == 25 { // AT_RANDOM
			random = uintptr(binary.NativeEndian.Uint64(auxv[8:]))
		}
	}
	if random == 0 {
		return 0, errors.New("no AT_RANDOM")
	}
	if _, err := unix.PtracePokeData(pid, random, []byte("the same each run")[:16]); err != nil {
		return 0, err
	}
	if err := takeTurns(pid); err != nil {
		return 0, err
	}
	if err := unix.PtraceSetOptions(pid, unix.PTRACE_O_TRACECLONE|unix.PTRACE_O_EXITKILL); err != nil {
		return 0, err
	}
	for signal := 0; ; {
		if err := unix.PtraceCont(pid, signal); err != nil {
			return 0, err
		}
		ws, err := waitStopped(pid)
		if err != nil {
			return 0, err
		}
		if ws.TrapCause() == unix.PTRACE_EVENT_CLONE {
			break
		}
		signal = int(ws.StopSignal())
	}
	tid, err := unix.PtraceGetEventMsg(pid)
	if err != nil {
		return 0, err
	}
	if _, err := waitStopped(int(tid)); err != nil {
		return 0, err
	}
	return int(tid), unix.PtraceDetach(pid)
}

// anyCPU ends that a program which was started exactly has one CPU, which others
// may want: the calling thread is the only one that still works.
func anyCPU() {
	var all unix.CPUSet
	for cpu := range 8 * int(unsafe.Sizeof(all)) {
		all.Set(cpu)
	}
	unix.SchedSetaffinity(0, &all) // those that there are; where it fails the program only takes longer
}

// takeTurns gives the threads of a program one CPU, which a thread that is woken
// does not take from the one that wakes it. See anyCPU.
func takeTurns(pid int) error {
	var all, one unix.CPUSet
	if err := unix.SchedGetaffinity(0, &all); err != nil {
		return err
	}
	skip := int(simulations.Add(1)) % all.Count()
	for cpu := 0; one.Count() == 0; cpu++ {
		if all.IsSet(cpu) {
			if skip == 0 {
				one.Set(cpu)
			}
			skip--
		}
	}
	if err := unix.SchedSetaffinity(pid, &one); err != nil {
		return err
	}
	return unix.SchedSetAttr(pid, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_BATCH}, 0)
}

// simulations is how many were started: they share the CPUs.
var simulations atomic.Uint32

// waitStopped waits until a thread that is traced stops.
func waitStopped(tid int) (ws unix.WaitStatus, err error) {
	for {
		_, err := unix.Wait4(tid, &ws, unix.WALL, nil)
		if err == unix.EINTR {
			continue
		}
		if err == nil && !ws.Stopped() {
			err = fmt.Errorf("it has ended: %v", ws)
		}
		return ws, err
	}
}
