package bench

import (
	"crypto/md5"
	"errors"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// algDigest is the same MD5 made by the kernel's crypto over an AF_ALG socket:
// Linux's /dev/crypto. Data goes in by one system call, the digest comes out
// by another.
type algDigest struct {
	op   int
	key  []byte
	link *rawLink // counts the calls
}

// probeALG says what the kernel lacks.
func probeALG() error {
	d, err := newALG([]byte("probe"), &rawLink{})
	if err != nil {
		return err
	}
	defer d.close()
	var got [md5.Size]byte
	if err := d.sum(got[:], []byte("data")); err != nil {
		return err
	}
	if got != md5.Sum([]byte("dataprobe")) {
		return errors.New("the kernel's MD5 over AF_ALG is not MD5")
	}
	return nil
}

func newALG(key []byte, raw *rawLink) (*algDigest, error) {
	sock, err := unix.Socket(unix.AF_ALG, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if errors.Is(err, unix.EAFNOSUPPORT) {
		return nil, errors.New("the kernel has no AF_ALG sockets (CONFIG_CRYPTO_USER_API_HASH)")
	}
	if err != nil {
		return nil, os.NewSyscallError("socket AF_ALG", err)
	}
	defer unix.Close(sock)
	if err := unix.Bind(sock, &unix.SockaddrALG{Type: "hash", Name: "md5"}); err != nil {
		return nil, fmt.Errorf("the kernel has no md5 for AF_ALG (CONFIG_CRYPTO_USER_API_HASH, CONFIG_CRYPTO_MD5): %w", err)
	}
	// Such a socket has no address, so unix.Accept does not understand it.
	op, _, errno := unix.Syscall6(unix.SYS_ACCEPT4, uintptr(sock), 0, 0, unix.SOCK_CLOEXEC, 0, 0)
	if errno != 0 {
		return nil, os.NewSyscallError("accept AF_ALG", errno)
	}
	return &algDigest{int(op), key, raw}, nil
}

func (d *algDigest) sum(dst, p []byte) error {
	// One hash is made of what comes with MSG_MORE, until it is asked for.
	for parts := [][]byte{p, d.key}; len(parts) > 0; {
		d.link.calls++
		n, err := unix.SendmsgBuffers(d.op, parts, nil, nil, unix.MSG_MORE)
		if err != nil {
			return os.NewSyscallError("sendmsg AF_ALG", err)
		}
		for len(parts) > 0 && n >= len(parts[0]) {
			n -= len(parts[0])
			parts = parts[1:]
		}
		if len(parts) > 0 {
			parts[0] = parts[0][n:]
		}
	}
	d.link.calls++
	n, _, errno := unix.Syscall6(unix.SYS_RECVFROM, uintptr(d.op), uintptr(unsafe.Pointer(&dst[0])), md5.Size, 0, 0, 0)
	if errno != 0 || n != md5.Size {
		return fmt.Errorf("AF_ALG: %d bytes of digest: %w", n, errno)
	}
	return nil
}

func (d *algDigest) size() int { return md5.Size }
func (d *algDigest) close()    { unix.Close(d.op) }
