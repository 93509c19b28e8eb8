#include "textflag.h"

// FOLD multiplies the lanes of a by the constants in Z5 and adds next.
#define FOLD(a, t, next) \
	VPCLMULQDQ $0x00, Z5, a, t; \
	VPCLMULQDQ $0x11, Z5, a, a; \
	VPTERNLOGQ $0x96, next, t, a // exclusive or of the three

// func fold(crc uint32, p unsafe.Pointer, n uintptr, k *foldConstants) uint32
//
// Four accumulators of four lanes of 128 bits take 256 bytes a turn: each lane
// is multiplied by x^2048, low and high half by a constant each, and the next
// bytes are added. Then the accumulators are joined, then the lanes; what is
// left, 16 bytes that the message is congruent to, CRC32 reduces.
TEXT ·fold(SB), NOSPLIT, $0-36
	MOVL crc+0(FP), AX
	MOVQ p+8(FP), SI
	MOVQ n+16(FP), CX
	MOVQ k+24(FP), DX
	NOTL AX
	VMOVD     AX, X0
	VMOVDQU64 (SI), Z1
	VMOVDQU64 64(SI), Z2
	VMOVDQU64 128(SI), Z3
	VMOVDQU64 192(SI), Z4
	VPXORQ    Z0, Z1, Z1
	VBROADCASTI32X4 (DX), Z5 // x^2048
	ADDQ $256, SI
	SUBQ $256, CX
	JZ   join

turn:
	FOLD(Z1, Z6, (SI))
	FOLD(Z2, Z7, 64(SI))
	FOLD(Z3, Z8, 128(SI))
	FOLD(Z4, Z9, 192(SI))
	PREFETCHT0 2048(SI)
	PREFETCHT0 2112(SI)
	PREFETCHT0 2176(SI)
	PREFETCHT0 2240(SI)
	ADDQ $256, SI
	SUBQ $256, CX
	JNZ  turn

join:
	VBROADCASTI32X4 16(DX), Z5 // x^512
	FOLD(Z1, Z6, Z2)
	FOLD(Z1, Z6, Z3)
	FOLD(Z1, Z6, Z4)
	VMOVDQU64  32(DX), Z5 // x^384, x^256, x^128; nothing for the last lane
	VPCLMULQDQ $0x00, Z5, Z1, Z6
	VPCLMULQDQ $0x11, Z5, Z1, Z7
	VPXORQ     Z6, Z7, Z7
	VEXTRACTI32X4 $3, Z1, X2
	VEXTRACTI64X4 $1, Z7, Y3
	VPXORQ        Y3, Y7, Y7
	VEXTRACTI32X4 $1, Y7, X3
	VPTERNLOGQ    $0x96, X2, X3, X7
	VMOVQ   X7, AX
	VPEXTRQ $1, X7, BX
	XORL    R8, R8
	CRC32Q  AX, R8
	CRC32Q  BX, R8
	NOTL    R8
	MOVL    R8, ret+32(FP)
	VZEROUPPER
	RET
