package transport

import (
	"crypto/rand"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// MaxKeyLen is the longest key that TCP_MD5SIG takes, in bytes.
const MaxKeyLen = unix.TCP_MD5SIG_MAXKEYLEN

// MD5Sig is TCP whose every segment carries an MD5 signature under a key that
// both ends share (RFC 2385), made and verified by the kernel. A segment that
// was corrupted on the way, in whatever manner, or that comes from somebody
// without the key, is dropped and counted; the kernel retransmits. It guards
// against faults and strays; it neither hides content nor withstands a
// determined forger.
//
// It fails closed: a socket has the peer's key before it connects or listens,
// and a listener has for every other address a random key that nobody knows.
type MD5Sig struct {
	*endpoint
	key []byte
}

var _ Transport = (*MD5Sig)(nil)

// NewMD5Sig makes the transport to peer, whose end must have the same key, of 1
// to MaxKeyLen bytes, which is copied. The error is a *ConfigError, or a
// *UnsupportedError where the kernel cannot.
func NewMD5Sig(peer netip.Addr, key []byte, opt Options) (*MD5Sig, error) {
	// A key of length 0 would delete: connections would go on unsigned.
	if len(key) == 0 || len(key) > MaxKeyLen {
		return nil, &ConfigError{NameMD5Sig, fmt.Sprintf("key of %d bytes", len(key)), fmt.Sprintf("use a key of 1 to %d bytes", MaxKeyLen)}
	}
	e, err := newEndpoint(NameMD5Sig, peer, opt)
	if err != nil {
		return nil, err
	}
	if err := Probe(); err != nil {
		return nil, err
	}
	t := &MD5Sig{endpoint: e, key: append([]byte(nil), key...)}
	e.beforeUse = t.setKeys
	return t, nil
}

func (t *MD5Sig) setKeys(fd int, s socketKind) error {
	if err := setMD5Key(fd, s.ipv6, t.peer, -1, t.key); err != nil {
		return err
	}
	if !s.listen {
		return nil // it sends to the peer only
	}
	// The longest prefix wins, so the peer's own key is not shadowed. An
	// address without any key would connect unsigned.
	var nobody [32]byte
	_, _ = rand.Read(nobody[:]) // never fails: the program is ended instead
	all := []netip.Addr{netip.IPv4Unspecified()}
	if s.ipv6 {
		all = append(all, netip.IPv6Unspecified())
	}
	for _, a := range all {
		if err := setMD5Key(fd, s.ipv6, a, 0, nobody[:]); err != nil {
			return err
		}
	}
	return nil
}

// setMD5Key sets the key for addr, or with prefix ≥ 0 for its network. An
// IPv4 address on an AF_INET6 socket is written ::ffff:a.b.c.d.
func setMD5Key(fd int, ipv6 bool, addr netip.Addr, prefix int, key []byte) error {
	var s unix.TCPMD5Sig
	switch {
	case ipv6:
		s.Addr.Family = unix.AF_INET6
		a := addr.As16()
		copy(s.Addr.Data[6:], a[:])
	case addr.Is4():
		s.Addr.Family = unix.AF_INET
		a := addr.As4()
		copy(s.Addr.Data[2:], a[:])
	default:
		return fmt.Errorf("IPv6 peer %s on an IPv4 socket", addr)
	}
	opt, what := unix.TCP_MD5SIG, "setsockopt TCP_MD5SIG"
	if prefix >= 0 {
		opt, what = unix.TCP_MD5SIG_EXT, "setsockopt TCP_MD5SIG_EXT"
		s.Flags = unix.TCP_MD5SIG_FLAG_PREFIX
		s.Prefixlen = uint8(prefix)
	}
	s.Keylen = uint16(copy(s.Key[:], key))
	return os.NewSyscallError(what, unix.SetsockoptTCPMD5Sig(fd, unix.IPPROTO_TCP, opt, &s))
}

// Probe reports whether this kernel can sign: nil, or a *UnsupportedError
// that says what is missing. It needs no privilege and no network.
func Probe() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return &UnsupportedError{NameMD5Sig, "no IPv4 TCP sockets", "check the kernel and the service's sandbox", err}
	}
	defer func() { _ = unix.Close(fd) }()
	key := []byte("probe")
	if err := setMD5Key(fd, false, netip.AddrFrom4([4]byte{127, 0, 0, 1}), -1, key); err != nil {
		return unsupported(err, fipsEnabled())
	}
	if err := setMD5Key(fd, false, netip.IPv4Unspecified(), 0, key); err != nil {
		e := unsupported(err, fipsEnabled())
		if errors.Is(err, unix.ENOPROTOOPT) {
			e.Missing = "the kernel has no TCP_MD5SIG_EXT, without which unlisted addresses could connect unsigned"
			e.Remedy = "use Linux 4.13 or later"
		}
		return e
	}
	return nil
}

func unsupported(err error, fips bool) *UnsupportedError {
	e := &UnsupportedError{Transport: NameMD5Sig, Err: err}
	switch {
	case errors.Is(err, unix.ENOPROTOOPT):
		e.Missing = "the kernel has no TCP_MD5SIG"
		e.Remedy = "use a kernel built with CONFIG_TCP_MD5SIG=y"
	case fips, errors.Is(err, unix.EOPNOTSUPP):
		// ENOMEM up to Linux 6.18, EOPNOTSUPP later.
		e.Missing = "the kernel refuses MD5, as it does in FIPS mode"
		e.Remedy = "boot without fips=1; /proc/sys/crypto/fips_enabled shows the mode"
	case errors.Is(err, unix.ENOMEM):
		e.Missing = "the kernel has no memory for a TCP_MD5SIG key"
		e.Remedy = "raise net.core.optmem_max; the same answer comes from a kernel in FIPS mode"
	case errors.Is(err, unix.EINVAL):
		e.Missing = "the system does not understand TCP_MD5SIG, as under qemu-user"
		e.Remedy = "run on a Linux kernel itself, built with CONFIG_TCP_MD5SIG=y"
	default:
		e.Missing = "the kernel refuses a TCP_MD5SIG key"
		e.Remedy = "check the service's sandbox (seccomp) and the kernel's log"
	}
	return e
}

func fipsEnabled() bool {
	b, err := os.ReadFile("/proc/sys/crypto/fips_enabled")
	return err == nil && strings.TrimSpace(string(b)) == "1"
}
