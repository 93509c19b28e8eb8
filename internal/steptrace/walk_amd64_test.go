package steptrace

import (
	"encoding/binary"
	"fmt"
	"maps"
	"os"
	"reflect"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/arch/x86/x86asm"
	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror/pmem"
)

// unread are functions of Go's own assembly that the walk passes over. memmove
// and memclr pass the cache by, and fence that, only where they move hundreds
// of KiB; cputicks has a fence, to read a counter. The others are all in which
// x86asm v0.32 loses its way, since a variable may come to lead to any; they search,
// compare and compute.
var unread = map[string]bool{
	"runtime.memmove":                               true,
	"runtime.memclrNoHeapPointers":                  true,
	"runtime.cputicks":                              true,
	"crypto/internal/fips140/bigmod.addMulVVW1024":  true,
	"crypto/internal/fips140/bigmod.addMulVVW1536":  true,
	"crypto/internal/fips140/bigmod.addMulVVW2048":  true,
	"crypto/internal/fips140/sha256.blockAVX2":      true,
	"crypto/internal/fips140/sha512.blockAVX2":      true,
	"crypto/sha1.blockAVX2":                         true,
	"hash/crc32.ieeeCLMUL":                          true,
	"countbody":                                     true,
	"indexbody":                                     true,
	"indexbytebody":                                 true,
	"internal/runtime/gc/scan.scanSpanPackedAVX512": true,
	"math/big.addMulVVWW":                           true,
	"memeqbody":                                     true,
	"cmpbody":                                       true,
}

// walk reads the machine code of functions: from an entry along each jump, each
// call, and each function whose address the code takes, directly or from a
// variable. The code is this process's own, as the child runs the same binary.
// What it does not see are the methods behind interfaces, the function values
// that arguments carry, libc, and the kernel's vDSO. It goes farther than any
// call does: each function may grow its stack, which leads to the scheduler.
type walk struct {
	seen  map[uint64]bool
	todo  []uint64
	found []string // what flushes, fences, stores past the cache, or cannot be decoded
}

func (w *walk) from(pc uint64) {
	w.add(pc)
	for len(w.todo) > 0 {
		pc := w.todo[len(w.todo)-1]
		w.todo = w.todo[:len(w.todo)-1]
		w.straight(pc)
	}
}

func (w *walk) add(pc uint64) {
	if !w.seen[pc] {
		w.todo = append(w.todo, pc)
	}
}

// straight reads until a return, a jump, or code that was read already.
func (w *walk) straight(pc uint64) {
	for !w.seen[pc] {
		w.seen[pc] = true
		f := runtime.FuncForPC(uintptr(pc))
		if f == nil || unread[f.Name()] { // nil: the way into libc, with cgo
			return
		}
		code, _ := peek(pc)
		in := decode(pc, code[:])
		switch in.access {
		case accFlush, accFence, accNT:
			w.find(pc, in.name)
		case accUnknown:
			w.find(pc, fmt.Sprintf("not decoded: % x", code))
			return
		}
		x, err := x86asm.Decode(code[:], 64)
		if err != nil { // one of noMemory
			pc = in.next
			continue
		}
		ends := false
		switch x.Op {
		case x86asm.RET, x86asm.UD2, x86asm.INT, x86asm.UD1:
			return
		case x86asm.JMP:
			ends = true
		}
		for _, a := range x.Args {
			switch a := a.(type) {
			case x86asm.Rel:
				w.add(in.next + uint64(int64(a)))
			case x86asm.Mem:
				if a.Base == x86asm.RIP {
					w.taken(in.next + uint64(a.Disp))
				}
			}
		}
		if ends {
			return
		}
		pc = in.next
	}
}

// taken adds the function at the address a, or behind one or two pointers
// there: a function value points to the function's address.
func (w *walk) taken(a uint64) {
	for range 3 {
		if f := runtime.FuncForPC(uintptr(a)); f != nil {
			if uint64(f.Entry()) == a {
				w.add(a)
			}
			return
		}
		b, n := peek(a)
		if n < 8 {
			return
		}
		a = binary.LittleEndian.Uint64(b[:])
	}
}

func (w *walk) find(pc uint64, what string) {
	w.found = append(w.found, fmt.Sprintf("%s in %s", what, function(pc)))
}

// peek reads this process's memory where there is any.
func peek(a uint64) (b [16]byte, n int) {
	local := []unix.Iovec{{Base: &b[0], Len: uint64(len(b))}}
	n, _ = unix.ProcessVMReadv(os.Getpid(), local, []unix.RemoteIovec{{Base: uintptr(a), Len: len(b)}}, 0)
	return b, n
}

// read is what the walk has read from all leaves.
var read = struct {
	sync.Mutex
	walk
}{walk: walk{seen: map[uint64]bool{}}}

// checkLeaf: the code of a leaf that begins at pc neither flushes nor fences,
// nor stores past the cache.
func checkLeaf(pc uint64) error {
	read.Lock()
	defer read.Unlock()
	read.from(pc)
	if len(read.found) > 0 {
		return fmt.Errorf("%s runs at full speed, but it, or a leaf before it, leads to: %s", function(pc), strings.Join(read.found[:min(len(read.found), 10)], "; "))
	}
	return nil
}

// TestWalk: the walk finds what the primitives do, behind calls and a switch,
// and nothing else in all that they lead to.
func TestWalk(t *testing.T) {
	for _, c := range []struct {
		f    any
		want []string
	}{
		{(*pmem.Region).Flush, []string{"CLFLUSH", "CLFLUSHOPT", "CLWB"}},
		{(*pmem.Region).Fence, []string{"SFENCE"}},
		{(*pmem.Region).Copy, []string{"CLFLUSH", "CLFLUSHOPT", "CLWB", "MOVNTI", "VMOVNTDQ"}},
	} {
		pc := uint64(reflect.ValueOf(c.f).Pointer())
		w := &walk{seen: map[uint64]bool{}}
		w.from(pc)
		names := map[string]bool{}
		for _, s := range w.found {
			name, where, _ := strings.Cut(s, " in ")
			names[name] = true
			if !strings.HasPrefix(where, module+"/pmem.") {
				t.Errorf("%s leads to %s", function(pc), s)
			}
		}
		if got := slices.Sorted(maps.Keys(names)); !slices.Equal(got, c.want) {
			t.Errorf("%s leads to %v, want %v", function(pc), got, c.want)
		}
	}
}
