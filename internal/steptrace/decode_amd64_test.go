package steptrace

import (
	"bytes"
	"encoding/hex"
	"strings"
	"testing"

	"golang.org/x/arch/x86/x86asm"
	"golang.org/x/sys/unix"
)

// access is what an instruction does to memory that it names.
type access uint8

const (
	accNone    access = iota // names no memory
	accLoad                  // only reads it
	accStore                 // stores through the cache
	accNT                    // stores past the cache
	accString                // stores at RDI, and moves it
	accFlush                 // CLWB, CLFLUSHOPT, CLFLUSH
	accFence                 // SFENCE, MFENCE
	accSyscall               // SYSCALL
	accUnclear               // none of the lists knows: an error where it names the region
	accUnknown               // cannot be decoded
)

// inst is a decoded instruction.
type inst struct {
	access access
	mem    x86asm.Mem // of all but accNone, accString, accFence, accSyscall
	size   int        // bytes stored
	next   uint64     // address of the instruction behind it
	name   string     // of flushes, fences and stores
	leaf   bool       // the first one of a leaf
	moves  mover      // the first one of a function that moves bytes
	raw    [16]byte
}

// stores are the instructions that store the whole of a memory operand in
// first place, and do it always.
var stores = words(`MOV MOVUPS MOVUPD MOVAPS MOVAPD MOVDQA MOVDQU MOVQ MOVD MOVSS MOVSD_XMM MOVHPS MOVLPS MOVHPD MOVLPD
	MOVBE ADD SUB ADC SBB AND OR XOR NOT NEG INC DEC XCHG XADD CMPXCHG CMPXCHG8B CMPXCHG16B
	SHL SHR SAR ROL ROR RCL RCR SHLD SHRD BTS BTR BTC POP
	SETA SETAE SETB SETBE SETE SETG SETGE SETL SETLE SETNE SETNO SETNP SETNS SETO SETP SETS
	VMOVDQU VMOVDQA VMOVDQU8 VMOVDQU16 VMOVDQU32 VMOVDQU64 VMOVDQA32 VMOVDQA64 VMOVUPS VMOVUPD VMOVAPS VMOVAPD VMOVQ VMOVD VMOVSS VMOVSD`)

var ntStores = words(`MOVNTI MOVNTQ MOVNTDQ MOVNTPS MOVNTPD VMOVNTDQ VMOVNTPS VMOVNTPD`)

// loads only read a memory operand in first place.
var loads = words(`CMP TEST BT NOP PREFETCHT0 PREFETCHT1 PREFETCHT2 PREFETCHNTA PREFETCHW PUSH CALL JMP
	MUL IMUL DIV IDIV LDMXCSR`)

var stringStores = words(`MOVSB MOVSW MOVSD MOVSQ STOSB STOSW STOSD STOSQ`)

// noMemory are encodings that x86asm does not know and that name no memory:
// ENDBR64.
var noMemory = [][]byte{{0xf3, 0x0f, 0x1e, 0xfa}}

func words(s string) map[string]bool {
	m := map[string]bool{}
	for _, w := range strings.Fields(s) {
		m[w] = true
	}
	return m
}

// decode judges the instruction in code, which lies at pc.
func decode(pc uint64, code []byte) *inst {
	in := &inst{}
	copy(in.raw[:], code)
	for _, b := range noMemory {
		if bytes.HasPrefix(code, b) {
			in.next = pc + uint64(len(b))
			return in
		}
	}
	x, err := x86asm.Decode(code, 64)
	if err != nil || x.Op == 0 {
		in.access = accUnknown
		return in
	}
	in.next, in.size, in.name = pc+uint64(x.Len), x.MemBytes, x.Op.String()
	first, named := x.Args[0].(x86asm.Mem)
	in.mem = first
	if !named {
		for _, a := range x.Args[1:] {
			if m, ok := a.(x86asm.Mem); ok {
				in.mem, named = m, true
			}
		}
		if !named {
			in.plain(x.Op)
			return in
		}
		in.access = accLoad
		if x.Op == x86asm.XCHG {
			in.access = accStore
		}
		return in
	}
	masked := code[0] == 0x62 && code[3]&7 != 0
	switch {
	// x86asm v0.32 takes CLWB for XSAVEOPT and CLFLUSHOPT for CLFLUSH: they
	// differ in the operand size prefix.
	case x.Op == x86asm.XSAVEOPT && hasPrefix(code, 0x66):
		in.access, in.name = accFlush, "CLWB"
	case x.Op == x86asm.CLFLUSH && hasPrefix(code, 0x66):
		in.access, in.name = accFlush, "CLFLUSHOPT"
	case x.Op == x86asm.CLFLUSH:
		in.access = accFlush
	case stringStores[in.name]:
		in.access = accString
	case masked:
		in.access = accUnclear
	case stores[in.name]:
		in.access = accStore
	case ntStores[in.name]:
		in.access = accNT
	case loads[in.name]:
		in.access = accLoad
	default:
		in.access = accUnclear
	}
	if (in.access == accStore || in.access == accNT) && in.size == 0 {
		in.access = accUnclear
	}
	return in
}

// plain judges an instruction without a memory operand.
func (in *inst) plain(op x86asm.Op) {
	switch op {
	case x86asm.SFENCE, x86asm.MFENCE:
		in.access = accFence
	case x86asm.SYSCALL:
		in.access = accSyscall
	case x86asm.MASKMOVDQU, x86asm.MASKMOVQ: // store at RDI, by a mask
		in.access = accUnknown
	}
}

// hasPrefix reports whether b is among the legacy prefixes of code.
func hasPrefix(code []byte, b byte) bool {
	for _, c := range code {
		switch c {
		case b:
			return true
		case 0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65, 0x66, 0x67, 0xf0, 0xf2, 0xf3:
		default:
			return false
		}
	}
	return false
}

// address is where the memory operand lies. The region lies above 4 GiB, so
// what a 32-bit address names is not it.
func (in *inst) address(r *unix.PtraceRegs) uint64 {
	a := uint64(in.mem.Disp) + register(in.mem.Base, in, r)
	if in.mem.Index != 0 {
		a += register(in.mem.Index, in, r) * uint64(in.mem.Scale)
	}
	switch in.mem.Segment {
	case x86asm.FS:
		a += r.Fs_base
	case x86asm.GS:
		a += r.Gs_base
	}
	return a
}

func register(reg x86asm.Reg, in *inst, r *unix.PtraceRegs) uint64 {
	switch {
	case reg == x86asm.RIP:
		return in.next
	case reg >= x86asm.RAX && reg <= x86asm.R15:
		return [...]uint64{
			r.Rax, r.Rcx, r.Rdx, r.Rbx, r.Rsp, r.Rbp, r.Rsi, r.Rdi,
			r.R8, r.R9, r.R10, r.R11, r.R12, r.R13, r.R14, r.R15,
		}[reg-x86asm.RAX]
	}
	return 0
}

// TestDecode holds the encodings that pmem's assembly and Go's memmove have.
func TestDecode(t *testing.T) {
	regs := unix.PtraceRegs{Rdi: 0x10000, Rsi: 0x20000, Rax: 0x30000, Rcx: 2, R8: 0x40000, R12: 0x50000}
	for _, c := range []struct {
		code   string
		access access
		name   string
		addr   uint64
		size   int
	}{
		{"660fae30", accFlush, "CLWB", 0x30000, 0},
		{"660fae38", accFlush, "CLFLUSHOPT", 0x30000, 0},
		{"66410fae3c24", accFlush, "CLFLUSHOPT", 0x50000, 0},
		{"0fae38", accFlush, "CLFLUSH", 0x30000, 0},
		{"0faef8", accFence, "SFENCE", 0, 0},
		{"480fc307", accNT, "MOVNTI", 0x10000, 8},
		{"480fc35f08", accNT, "MOVNTI", 0x10008, 8},
		{"c5fde707", accNT, "VMOVNTDQ", 0x10000, 32},
		{"62e17d48e707", accNT, "VMOVNTDQ", 0x10000, 64},
		{"62e17d48e74707", accNT, "VMOVNTDQ", 0x101c0, 64},
		{"62e1fe487f4701", accStore, "VMOVDQU64", 0x10040, 64},
		{"62e1fe4a7f4701", accUnclear, "VMOVDQU64", 0x10040, 64}, // masked
		{"62e1fe486f06", accLoad, "VMOVDQU64", 0x20000, 64},
		{"c5fe7f07", accStore, "VMOVDQU", 0x10000, 32},
		{"c4417e7f00", accStore, "VMOVDQU", 0x40000, 32},
		{"c5fe6f06", accLoad, "VMOVDQU", 0x20000, 32},
		{"f30f7f07", accStore, "MOVDQU", 0x10000, 16},
		{"0f1107", accStore, "MOVUPS", 0x10000, 16},
		{"f348a5", accString, "MOVSQ", 0, 0},
		{"f3a4", accString, "MOVSB", 0, 0},
		{"f348ab", accString, "STOSQ", 0, 0},
		{"488707", accStore, "XCHG", 0x10000, 8},
		{"f0480fb10f", accStore, "CMPXCHG", 0x10000, 8},
		{"880c4f", accStore, "MOV", 0x10004, 1},
		{"66890f", accStore, "MOV", 0x10000, 2},
		{"894ffc", accStore, "MOV", 0xfffc, 4},
		{"480107", accStore, "ADD", 0x10000, 8},
		{"480307", accLoad, "ADD", 0x10000, 8},
		{"483907", accLoad, "CMP", 0x10000, 8},
		{"f30f1efa", accNone, "", 0, 0},
		{"0f05", accSyscall, "SYSCALL", 0, 0},
		{"660ff7c1", accUnknown, "MASKMOVDQU", 0, 0},
		{"0fae27", accUnclear, "XSAVE", 0x10000, 0},
	} {
		code, err := hex.DecodeString(c.code)
		if err != nil {
			t.Fatal(err)
		}
		in := decode(0x1000, append(code, make([]byte, 16-len(code))...))
		if in.access != c.access || in.name != c.name {
			t.Errorf("%s: %d %s, want %d %s", c.code, in.access, in.name, c.access, c.name)
			continue
		}
		if c.addr != 0 && in.address(&regs) != c.addr {
			t.Errorf("%s: address %#x, want %#x", c.code, in.address(&regs), c.addr)
		}
		if c.size != 0 && in.size != c.size {
			t.Errorf("%s: %d bytes, want %d", c.code, in.size, c.size)
		}
	}
}
