package steptrace

import (
	"debug/elf"
	"debug/gosym"
	"encoding/binary"
	"fmt"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// leaves are functions that take most of the steps and only compute: they run
// at full speed, to a breakpoint where they return. That they issue no flush
// and no fence, their machine code shows (checkLeaf); that they do not store
// into the region either, the next comparison shows.
var leaves = map[string]bool{
	"fmt.Fprintf":                                true,
	"fmt.Sprintf":                                true,
	"hash/crc32.update":                          true,
	"path/filepath.EvalSymlinks":                 true,
	"runtime.concatstrings":                      true,
	"runtime.copystack":                          true,
	"runtime.findfunc":                           true,
	"runtime.getitab":                            true,
	"runtime.growslice":                          true,
	"runtime.mallocgc":                           true,
	"runtime.newobject":                          true,
	"runtime.pcvalue":                            true,
	"runtime.nanotime1":                          true,
	"time.now":                                   true,
	module + ".(*metadata).encode":               true,
	module + ".decodeEntry":                      true,
	module + ".decodeMetadata":                   true,
	module + ".newestEntry":                      true,
	module + "/internal/crc32c.Combine":          true,
	module + "/internal/crc32c.Patch":            true,
	module + "/internal/crc32c.SumWords":         true,
	module + "/journal.(*Records).Next":          true,
	module + "/journal.DecodeHeader":             true,
	module + "/journal.(*Finder).Next":           true,
	module + "/journal.Ring.Header":              true,
	module + "/journal.Ring.Segment":             true,
	module + "/replicate/transport.ReadCounters": true,
}

// mover tells to where a function that is about to start stores, and how much.
type mover func(*unix.PtraceRegs) (to, n uint64)

// movers are leaves where they do not store into the region, and store so
// little that they do not pass the cache by.
var movers = map[string]mover{
	"runtime.memmove":              func(r *unix.PtraceRegs) (to, n uint64) { return r.Rax, r.Rcx },
	"runtime.memclrNoHeapPointers": func(r *unix.PtraceRegs) (to, n uint64) { return r.Rax, r.Rbx },
}

// moverEntry is MOVQ AX, DI: how they begin where they take their arguments in
// registers.
var moverEntry = []byte{0x48, 0x89, 0xc7}

func (t *tracer) elsewhere(in *inst) bool {
	to, n := in.moves(&t.regs)
	return n <= 64<<10 && (t.region.addr == 0 || to+n <= t.region.addr || to >= t.region.addr+t.region.size)
}

const module = "github.com/nvmmirror/nvmmirror"

// runLeaf runs the function whose first instruction comes next.
func (t *tracer) runLeaf() error {
	var back [8]byte
	if _, err := unix.PtracePeekData(t.worker, uintptr(t.regs.Rsp), back[:]); err != nil {
		return fmt.Errorf("ptrace: return address: %w", err)
	}
	at := uintptr(binary.LittleEndian.Uint64(back[:]))
	var code [1]byte
	if _, err := unix.PtracePeekText(t.worker, at, code[:]); err != nil {
		return fmt.Errorf("ptrace: code at %#x: %w", at, err)
	}
	if _, err := unix.PtracePokeText(t.worker, at, []byte{0xcc}); err != nil {
		return fmt.Errorf("ptrace: breakpoint at %#x: %w", at, err)
	}
	if err := t.move(unix.PTRACE_CONT); err != nil {
		return err
	}
	if _, err := unix.PtracePokeText(t.worker, at, code[:]); err != nil {
		return fmt.Errorf("ptrace: breakpoint at %#x: %w", at, err)
	}
	t.regs.Rip--
	if t.regs.Rip != uint64(at) {
		return fmt.Errorf("%s did not return to where it was called", function(t.regs.Rip))
	}
	return t.ptrace(unix.PTRACE_SETREGS, t.worker, 0, uintptr(unsafe.Pointer(&t.regs)))
}

// site is the first caller outside of package pmem of a function without a
// frame, by the frame pointers; the function itself where they do not tell.
func (t *tracer) site(r *unix.PtraceRegs) uint64 {
	at, frame := uintptr(r.Rsp), uintptr(r.Rbp)
	for range 8 {
		var b [16]byte
		n := 8
		if at != uintptr(r.Rsp) {
			n = 16
		}
		local := []unix.Iovec{{Base: &b[0], Len: uint64(n)}}
		if got, err := unix.ProcessVMReadv(t.pid, local, []unix.RemoteIovec{{Base: at, Len: n}}, 0); err != nil || got != n {
			break
		}
		if n == 16 {
			frame = uintptr(binary.LittleEndian.Uint64(b[:]))
		}
		pc := binary.LittleEndian.Uint64(b[n-8:]) - 1
		if f := runtime.FuncForPC(uintptr(pc)); f == nil {
			break
		} else if !strings.HasPrefix(f.Name(), module+"/pmem.") {
			return pc
		}
		at = frame
	}
	return r.Rip
}

// preempt makes the goroutine that has just fenced give way, in the middle of
// its commit, as Go's monitor thread would if it were not standing still: that
// sets stackguard0 of g, which R14 holds, to stackPreempt.
func (t *tracer) preempt() error {
	const stackguard0, stackPreempt = 16, ^uint64(1313)
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], stackPreempt)
	if _, err := unix.PtracePokeData(t.worker, uintptr(t.regs.R14)+stackguard0, b[:]); err != nil {
		return fmt.Errorf("ptrace: preempting the committer: %w", err)
	}
	return nil
}

// TestLeavesAreThere: one that was renamed would be stepped, which takes minutes more,
// and nobody told.
func TestLeavesAreThere(t *testing.T) {
	self, err := elf.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	lines, err := self.Section(".gopclntab").Data()
	if err != nil {
		t.Fatal(err)
	}
	table, err := gosym.NewTable(nil, gosym.NewLineTable(lines, self.Section(".text").Addr))
	if err != nil {
		t.Fatal(err)
	}
	for name := range leaves {
		if strings.HasPrefix(name, module) && table.LookupFunc(name) == nil { // Go's own are another release's
			t.Errorf("there is no %s", name)
		}
	}
}
