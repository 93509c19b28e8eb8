package bench

import (
	"bytes"
	"fmt"
	"math/rand/v2"

	"golang.org/x/sys/unix"
)

const (
	maxMessage = 1 << 20
	chunk      = 64 << 10 // bytes of a stream's message, as the mirror's largest frame
	drain      = 1 << 20  // a stream's receiver takes up to so much at once

	shifts    = 4096    // so many bytes the pattern is longer than a message
	shiftStep = 61 * 64 // an odd number of cache lines: messages walk over all of it, each aligned
	seed      = 0x6e766d
)

// A buffer is memory outside of Go's heap, present from the start: no fault
// falls into a measurement, and none of it stays behind.
type buffer []byte

func newBuffer(n int) (buffer, error) {
	b, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("%d bytes of memory: %w", n, err)
	}
	return b, nil
}

func (b buffer) free() { _ = unix.Munmap(b) }

// A pattern is what messages of up to size bytes are pieces of.
type pattern struct {
	size int
	b    buffer
	last buffer // for the last message, which differs in its first byte
}

func newPattern(size int) (*pattern, error) {
	b, err := newBuffer(size + shifts)
	if err != nil {
		return nil, err
	}
	last, err := newBuffer(size)
	if err != nil {
		b.free()
		return nil, err
	}
	rng := rand.New(rand.NewPCG(seed, seed))
	for i := range b {
		b[i] = byte(1 + rng.Uint32()%255)
	}
	return &pattern{size, b, last}, nil
}

func (p *pattern) free() {
	p.b.free()
	p.last.free()
}

// message is the n-th message.
func (p *pattern) message(n uint64) []byte {
	return p.b[n*shiftStep%shifts:][:p.size]
}

// ending is the n-th message if it is the last.
func (p *pattern) ending(n uint64) []byte {
	copy(p.last, p.message(n))
	p.last[0] = 0
	return p.last
}

// check compares the piece of message n that starts at byte at.
func (p *pattern) check(n uint64, at int, got []byte) error {
	want := p.message(n)[at:][:len(got)]
	if at == 0 && got[0] == 0 {
		got, want = got[1:], want[1:]
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("message %d differs from what was sent, within %d bytes from byte %d", n, len(got), at)
	}
	return nil
}
