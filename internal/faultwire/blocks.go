package faultwire

import (
	"bytes"
	crand "crypto/rand"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// BlockSize is the unit in which CompareTransports tells right from wrong.
const BlockSize = 1 << 10

const (
	chunkSize = 64 * BlockSize
	keySize   = 32
)

// fillBlock writes what block i holds: SplitMix64, of which any block is
// computed alone and no two are alike.
func fillBlock(b []byte, seed uint64, i int64) {
	x := seed + uint64(i)*BlockSize/8*0x9e3779b97f4a7c15
	for ; len(b) >= 8; b = b[8:] {
		x += 0x9e3779b97f4a7c15
		z := x
		z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
		z = (z ^ z>>27) * 0x94d049bb133111eb
		binary.LittleEndian.PutUint64(b, z^z>>31)
	}
}

// sendBlocks writes total bytes of blocks and waits until the receiver has them.
func sendBlocks(c net.Conn, seed uint64, total int64) error {
	chunk := make([]byte, chunkSize)
	for at := int64(0); at < total; at += chunkSize {
		b := chunk[:min(chunkSize, total-at)]
		for k := 0; k < len(b); k += BlockSize {
			fillBlock(b[k:k+BlockSize], seed, (at+int64(k))/BlockSize)
		}
		if _, err := c.Write(b); err != nil {
			return fmt.Errorf("send at %d of %d: %w", at, total, err)
		}
	}
	if _, err := io.ReadFull(c, chunk[:1]); err != nil {
		return fmt.Errorf("wait for the receiver: %w", err)
	}
	return nil
}

// receiveBlocks reads total bytes, counts blocks that differ from what was
// sent, and tells the sender that it has all.
func receiveBlocks(c net.Conn, seed uint64, total int64) (got, wrong int64, err error) {
	chunk := make([]byte, chunkSize)
	want := make([]byte, BlockSize)
	for got < total {
		b := chunk[:min(chunkSize, total-got)]
		n, err := io.ReadFull(c, b)
		whole := n - n%BlockSize
		for k := 0; k < whole; k += BlockSize {
			fillBlock(want, seed, (got+int64(k))/BlockSize)
			if !bytes.Equal(b[k:k+BlockSize], want) {
				wrong++
			}
		}
		got += int64(whole)
		if err != nil {
			return got, wrong, fmt.Errorf("receive at %d of %d: %w", got, total, err)
		}
	}
	if _, err := c.Write(chunk[:1]); err != nil {
		return got, wrong, fmt.Errorf("tell the sender: %w", err)
	}
	return got, wrong, nil
}

// newKey draws a TCP_MD5SIG key.
func newKey() []byte {
	key := make([]byte, keySize)
	_, _ = crand.Read(key) // never fails: it ends the program instead
	return key
}

// socketControl prepares a socket before it listens or connects: both
// transports get the same congestion control, and with a key every segment
// from and to the peer is signed.
func socketControl(peer netip.Addr, key []byte) func(network, address string, c syscall.RawConn) error {
	return func(network, _ string, c syscall.RawConn) error {
		var opt error
		err := c.Control(func(fd uintptr) {
			// A pacing default (BBR) would be measured instead of the signature.
			// Reno is in every kernel, cubic in most; neither matters for what is
			// right and wrong, so a refusal is no error.
			if unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "cubic") != nil {
				_ = unix.SetsockoptString(int(fd), unix.IPPROTO_TCP, unix.TCP_CONGESTION, "reno")
			}
			if key != nil {
				opt = setMD5Key(int(fd), peer, key)
			}
		})
		if err == nil && opt != nil {
			err = fmt.Errorf("TCP_MD5SIG on a %s socket: %w", network, opt)
		}
		return err
	}
}

// setMD5Key sets the key for a peer. The socket's family must be the address's.
func setMD5Key(fd int, peer netip.Addr, key []byte) error {
	var sig unix.TCPMD5Sig
	if peer.Is4() {
		sig.Addr.Family = unix.AF_INET
		copy(sig.Addr.Data[2:6], peer.AsSlice())
	} else {
		sig.Addr.Family = unix.AF_INET6
		copy(sig.Addr.Data[6:22], peer.AsSlice())
	}
	sig.Keylen = uint16(copy(sig.Key[:], key))
	return unix.SetsockoptTCPMD5Sig(fd, unix.IPPROTO_TCP, unix.TCP_MD5SIG, &sig)
}
