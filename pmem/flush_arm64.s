#include "textflag.h"

// Leaves without a frame: a fault inside becomes a panic of the calling
// goroutine.

// func flushLinesCVAP(p unsafe.Pointer, n, step uintptr)
// p is line-aligned; n is a multiple of step and not 0.
TEXT ·flushLinesCVAP(SB), NOSPLIT, $0-24
	MOVD p+0(FP), R0
	MOVD n+8(FP), R1
	MOVD step+16(FP), R2

line:
	DC   CVAP, R0
	ADD  R2, R0
	SUBS R2, R1
	BNE  line
	DSB  $15            // SY
	RET

// func storeFence()
TEXT ·storeFence(SB), NOSPLIT, $0-0
	DSB $15             // SY
	RET

// func cacheType() uintptr
TEXT ·cacheType(SB), NOSPLIT, $0-8
	MRS  CTR_EL0, R0
	MOVD R0, ret+0(FP)
	RET
