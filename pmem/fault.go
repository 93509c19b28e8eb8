package pmem

import (
	"fmt"
	"runtime"
	"runtime/debug"
	"unsafe"
)

// FaultError says that a page of a mapping could not be read or written.
type FaultError struct {
	Path string // "" where the mapping has none
	// Offset lies in the page that faulted. Of several bad pages in one copy
	// it is not always the first: a copy may begin at its end.
	Offset int64
	Err    error // the runtime's
}

func (e *FaultError) Error() string {
	path := e.Path
	if path == "" {
		path = "mapping"
	}
	return fmt.Sprintf("pmem: %s: memory fault at offset %d: the file was truncated by someone, or the page is poisoned (uncorrectable media error), or a hole of the file finds no room (a sparse copy on a full tmpfs): compare the file's length, look for memory errors in the kernel log and with ndctl list --media-errors, then restore this range from the peer",
		path, e.Offset)
}

func (e *FaultError) Unwrap() error { return e.Err }

// Arm makes memory faults of the calling goroutine panics, which [Recover]
// turns into errors, and returns the previous setting for it:
//
//	func f(mem pmem.Memory) (err error) {
//		defer pmem.Recover(mem, pmem.Arm(), &err)
//
// Nesting is fine. Without it, a fault ends the process. So does a bad page that
// nobody touches where vm.memory_failure_early_kill is set, unless the process asks
// for the signal later: prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_LATE).
func Arm() (old bool) { return debug.SetPanicOnFault(true) }

// Recover ends what [Arm] began. Deferred, it turns a fault inside m's mapping
// into a *[FaultError] in *err, and panics again with anything else. A store
// that faulted may be there in part.
//
// m is a [Memory], a [View] or anything else that says where the mapping is.
func Recover(m interface{ Bytes() []byte }, old bool, err *error) {
	debug.SetPanicOnFault(old)
	value := recover()
	if value == nil {
		return
	}
	if *err = AsFault(m, value); *err == nil {
		panic(value)
	}
}

// AsFault is a panic's value as a *[FaultError], nil where it is no fault inside m's
// mapping: for a deferred function that does what [Recover] does, and more.
func AsFault(m interface{ Bytes() []byte }, value any) error {
	fault, ok := value.(interface {
		runtime.Error
		Addr() uintptr
	})
	if !ok {
		return nil
	}
	mem := m.Bytes()
	off := fault.Addr() - uintptr(unsafe.Pointer(unsafe.SliceData(mem)))
	if off >= uintptr(len(mem)) {
		return nil
	}
	e := &FaultError{Offset: int64(off), Err: fault}
	if named, ok := m.(interface{ Path() string }); ok {
		e.Path = named.Path()
	}
	return e
}
