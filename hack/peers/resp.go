package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// respConn speaks Redis' protocol over a blocking socket, without Go's
// netpoller: the client with the least overhead.
type respConn struct {
	fd int
	r  *bufio.Reader
}

func dialRESP(family int, to unix.Sockaddr) (*respConn, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	c := &respConn{fd: fd}
	c.r = bufio.NewReader(c)
	late := unix.NsecToTimeval((10 * time.Second).Nanoseconds())
	err = errors.Join(unix.Connect(fd, to), unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &late))
	if family == unix.AF_INET {
		err = errors.Join(err, unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1))
	}
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return c, nil
}

func (c *respConn) close() {
	if c != nil {
		unix.Close(c.fd)
	}
}

// Read implements io.Reader.
func (c *respConn) Read(p []byte) (int, error) {
	for {
		n, err := unix.Read(c.fd, p)
		switch {
		case err == unix.EINTR:
			continue
		case err != nil:
			return 0, fmt.Errorf("no reply: %w", err)
		case n == 0:
			return 0, io.ErrUnexpectedEOF
		}
		return n, nil
	}
}

func (c *respConn) send(p []byte) error {
	for len(p) > 0 {
		n, err := unix.Write(c.fd, p)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return err
		}
		p = p[n:]
	}
	return nil
}

// request appends a command as Redis wants it.
func request(to []byte, args ...string) []byte {
	to = fmt.Appendf(to, "*%d\r\n", len(args))
	for _, a := range args {
		to = fmt.Appendf(to, "$%d\r\n%s\r\n", len(a), a)
	}
	return to
}

// line reads what a reply begins with.
func (c *respConn) line() (string, error) {
	b, err := c.r.ReadSlice('\n')
	if err != nil {
		return "", err
	}
	s := strings.TrimSuffix(string(b), "\r\n")
	if s == "" || s[0] == '-' {
		return "", fmt.Errorf("redis says %q", s)
	}
	return s, nil
}

// do sends a command and returns its reply, the parts of an array joined by
// spaces.
func (c *respConn) do(args ...string) (string, error) {
	if err := c.send(request(nil, args...)); err != nil {
		return "", err
	}
	return c.reply()
}

func (c *respConn) reply() (string, error) {
	s, err := c.line()
	if err != nil || strings.IndexByte("$*", s[0]) < 0 {
		return strings.TrimLeft(s, "+:"), err
	}
	n, err := strconv.Atoi(s[1:])
	if err != nil {
		return "", fmt.Errorf("redis says %q: %w", s, err)
	}
	if s[0] == '*' {
		parts := make([]string, n)
		for i := range parts {
			if parts[i], err = c.reply(); err != nil {
				return "", err
			}
		}
		return strings.Join(parts, " "), nil
	}
	if n < 0 {
		return "", nil // null
	}
	b := make([]byte, n+2)
	if _, err := io.ReadFull(c.r, b); err != nil {
		return "", err
	}
	return string(b[:n]), nil
}
