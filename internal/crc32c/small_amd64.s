#include "textflag.h"

// func sumWords(p *uint64, n int) uint32
// n is not 0.
TEXT ·sumWords(SB), NOSPLIT, $0-20
	MOVQ p+0(FP), SI
	MOVQ n+8(FP), CX
	MOVL $-1, AX

word:
	CRC32Q (SI), AX
	ADDQ $8, SI
	DECQ CX
	JNZ  word
	NOTL AX
	MOVL AX, ret+16(FP)
	RET

// func changed(old, new unsafe.Pointer, n uintptr, shift uint32) uint32
//
// The carry-less product of two bit-reversed polynomials comes out one place
// short; CRC32 reduces it, and multiplies by x^32, which shift makes up for.
TEXT ·changed(SB), NOSPLIT, $0-36
	MOVQ old+0(FP), SI
	MOVQ new+8(FP), DI
	MOVQ n+16(FP), CX
	MOVL shift+24(FP), DX
	XORL AX, AX
	SUBQ $8, CX
	JB   bytes

word:
	MOVQ   (SI), BX
	XORQ   (DI), BX
	CRC32Q BX, AX
	ADDQ $8, SI
	ADDQ $8, DI
	SUBQ $8, CX
	JAE  word

bytes:
	ADDQ $8, CX
	JZ   done

byte:
	MOVBLZX (SI), BX
	XORB   (DI), BX
	CRC32B BX, AX
	INCQ SI
	INCQ DI
	DECQ CX
	JNZ  byte

done:
	MOVQ  AX, X0
	MOVQ  DX, X1
	PCLMULQDQ $0, X1, X0
	MOVQ  X0, AX
	ADDQ  AX, AX
	XORL  BX, BX
	CRC32Q AX, BX
	MOVL  BX, ret+32(FP)
	RET
