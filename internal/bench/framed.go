package bench

import (
	"crypto/md5"
	"encoding/binary"
	"errors"
	"hash"
	"io"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
)

// A digest is a checksum that userspace makes of each frame.
type digest interface {
	// sum replaces dst's content, of which it uses size bytes.
	sum(dst, p []byte) error
	size() int
	close()
}

// framed follows each frame, of at most frameLimit bytes, with its digest. Both
// ends cut messages into frames in the same way, so there is no header.
type framed struct {
	*rawLink
	d         digest
	own, sent [md5.Size]byte
	iov       [2]unix.Iovec
	msg       unix.Msghdr
}

var errDigest = errors.New("a frame's digest does not match")

func newFramed(raw *rawLink, d digest) *framed { return &framed{rawLink: raw, d: d} }

func (f *framed) close() {
	f.d.close()
	f.rawLink.close()
}

func (f *framed) send(p []byte) error {
	for len(p) > 0 {
		frame := p[:min(len(p), frameLimit)]
		p = p[len(frame):]
		if err := f.d.sum(f.own[:], frame); err != nil {
			return err
		}
		if err := f.move(unix.SYS_SENDMSG, frame, f.own[:f.d.size()], unix.MSG_NOSIGNAL); err != nil {
			return err
		}
	}
	return nil
}

func (f *framed) some(p []byte) (int, error) {
	frame := p[:min(len(p), frameLimit)]
	if err := f.move(unix.SYS_RECVMSG, frame, f.sent[:f.d.size()], 0); err != nil {
		return 0, err
	}
	if err := f.d.sum(f.own[:], frame); err != nil {
		return 0, err
	}
	if f.own != f.sent {
		return 0, errDigest
	}
	return len(frame), nil
}

// move sends or receives all of a and b.
func (f *framed) move(trap uintptr, a, b []byte, flags uintptr) error {
	for len(a)+len(b) > 0 {
		iov := f.iov[:0]
		for _, p := range [][]byte{a, b} {
			if len(p) > 0 {
				v := unix.Iovec{Base: &p[0]}
				v.SetLen(len(p))
				iov = append(iov, v)
			}
		}
		f.msg.Iov = &iov[0]
		f.msg.SetIovlen(len(iov))
		n, err := f.call(trap, uintptr(unsafe.Pointer(&f.msg)), 0, flags)
		if err != nil {
			return err
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
		k := min(n, len(a))
		a, b = a[k:], b[n-k:]
	}
	return nil
}

// md5Digest is a keyed MD5 as RFC 2385 has it, the key last, in Go.
type md5Digest struct {
	h   hash.Hash
	key []byte
}

func newMD5(key []byte) *md5Digest { return &md5Digest{md5.New(), key} }

func (d *md5Digest) sum(dst, p []byte) error {
	d.h.Reset()
	d.h.Write(p)
	d.h.Write(d.key)
	d.h.Sum(dst[:0])
	return nil
}

func (d *md5Digest) size() int { return md5.Size }
func (d *md5Digest) close()    {}

// crc is the CRC-32C that the mirror's frames have.
type crc struct{}

func (crc) sum(dst, p []byte) error {
	binary.LittleEndian.PutUint32(dst, crc32c.Sum(p))
	return nil
}

func (crc) size() int { return 4 }
func (crc) close()    {}
