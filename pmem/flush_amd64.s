#include "go_asm.h"
#include "textflag.h"

// Leaves without a frame: a fault inside becomes a panic of the calling
// goroutine.

// func flushLines(op flushOp, p unsafe.Pointer, lines uintptr)
// lines is not 0; p is line-aligned. An op that is none of amd64's does
// nothing.
TEXT ·flushLines(SB), NOSPLIT, $0-24
	MOVBLZX op+0(FP), BX
	MOVQ    p+8(FP), AX
	MOVQ    lines+16(FP), CX
	CMPL    BX, $const_flushCLWB
	JEQ     clwb
	CMPL    BX, $const_flushCLFLUSHOPT
	JEQ     clflushopt
	CMPL    BX, $const_flushCLFLUSH
	JEQ     clflush
	RET

clwb:
	CLWB (AX)
	ADDQ $64, AX
	DECQ CX
	JNZ  clwb
	RET

clflushopt:
	CLFLUSHOPT (AX)
	ADDQ       $64, AX
	DECQ       CX
	JNZ        clflushopt
	RET

clflush:
	CLFLUSH (AX)
	ADDQ    $64, AX
	DECQ    CX
	JNZ     clflush
	RET

// func storeFence()
TEXT ·storeFence(SB), NOSPLIT, $0-0
	SFENCE
	RET

// func cpuid(leaf, subleaf uint32) (eax, ebx, ecx, edx uint32)
TEXT ·cpuid(SB), NOSPLIT, $0-24
	MOVL leaf+0(FP), AX
	MOVL subleaf+4(FP), CX
	CPUID
	MOVL AX, eax+8(FP)
	MOVL BX, ebx+12(FP)
	MOVL CX, ecx+16(FP)
	MOVL DX, edx+20(FP)
	RET
