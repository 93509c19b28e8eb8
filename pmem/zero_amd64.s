#include "textflag.h"

// Non-temporal zeroing: whole cache lines that do not pass through the cache.
// They are ordered only by a later SFENCE. n is a multiple of 64 and not 0;
// dst is 64-aligned.

// func zeroLines64(dst unsafe.Pointer, n uintptr)
TEXT ·zeroLines64(SB), NOSPLIT, $0-16
	MOVQ dst+0(FP), DI
	MOVQ n+8(FP), CX
	VPXORQ Z16, Z16, Z16

line:
	VMOVNTDQ Z16, (DI)
	ADDQ $64, DI
	SUBQ $64, CX
	JNZ  line
	VZEROUPPER
	RET

// func zeroLines32(dst unsafe.Pointer, n uintptr)
TEXT ·zeroLines32(SB), NOSPLIT, $0-16
	MOVQ dst+0(FP), DI
	MOVQ n+8(FP), CX
	VPXOR Y0, Y0, Y0

line:
	VMOVNTDQ Y0, (DI)
	VMOVNTDQ Y0, 32(DI)
	ADDQ $64, DI
	SUBQ $64, CX
	JNZ  line
	VZEROUPPER
	RET

// func zeroLines8(dst unsafe.Pointer, n uintptr)
TEXT ·zeroLines8(SB), NOSPLIT, $0-16
	MOVQ dst+0(FP), DI
	MOVQ n+8(FP), CX
	XORL AX, AX

line:
	MOVNTIQ AX, (DI)
	MOVNTIQ AX, 8(DI)
	MOVNTIQ AX, 16(DI)
	MOVNTIQ AX, 24(DI)
	MOVNTIQ AX, 32(DI)
	MOVNTIQ AX, 40(DI)
	MOVNTIQ AX, 48(DI)
	MOVNTIQ AX, 56(DI)
	ADDQ $64, DI
	SUBQ $64, CX
	JNZ  line
	RET
