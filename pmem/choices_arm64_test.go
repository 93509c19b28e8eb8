package pmem

import (
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"
)

func availableFlushes() []flushOp {
	if detected.flush == flushNone || !cvapRuns() {
		return nil
	}
	return []flushOp{detected.flush}
}

func availableWidths() []ntWidth { return []ntWidth{ntNone} }

// cvapRuns tries DC CVAP in a forked child: qemu-user before 8.1 announces the
// instruction and then raises SIGILL, which nothing could recover from here.
var cvapRuns = sync.OnceValue(func() bool {
	line := make([]byte, 2*LineSize)
	p := unsafe.Add(unsafe.Pointer(&line[0]), -uintptr(unsafe.Pointer(&line[0]))&(LineSize-1))
	var byDefault [32]byte // struct sigaction with SIG_DFL
	pid, _, errno := unix.RawSyscall6(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0, 0, 0, 0)
	if errno != 0 {
		return false
	}
	if pid == 0 {
		unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(unix.SIGILL), uintptr(unsafe.Pointer(&byDefault)), 0, 8, 0, 0)
		flushLinesCVAP(p, LineSize, cvapStep)
		for {
			unix.RawSyscall(unix.SYS_EXIT_GROUP, 0, 0, 0)
		}
	}
	var status unix.WaitStatus
	if err := retry(func() error { _, err := unix.Wait4(int(pid), &status, 0, nil); return err }); err != nil {
		return false
	}
	return status.Exited() && status.ExitStatus() == 0
})
