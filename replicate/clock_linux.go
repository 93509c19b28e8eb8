package replicate

import (
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// boottime is CLOCK_BOOTTIME: it goes on while the machine is suspended, so a
// read lease does not outlive a nap.
func boottime() time.Duration {
	var ts unix.Timespec
	// Without telling the scheduler: it takes no time, and the call would wake
	// Go's monitor thread, which then looks a dozen times at an idle node.
	if _, _, err := unix.RawSyscall(unix.SYS_CLOCK_GETTIME, unix.CLOCK_BOOTTIME, uintptr(unsafe.Pointer(&ts)), 0); err != 0 {
		panic("replicate: CLOCK_BOOTTIME: " + err.Error()) // in Linux since 2.6.39
	}
	return time.Duration(ts.Nano())
}

// now is the node's clock.
func (p *Pair) now() time.Duration { return p.cfg.Clock() }
