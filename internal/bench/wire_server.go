package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a driver waits for the one before it.
const patience = 2 * time.Second

// ServeWire is the other end of [Wire] on a host of its own, until ctx ends. It
// serves one driver after the other, and tells one that would have to wait for long
// whose measurement it is busy with. The data's connections are between the same
// addresses as the control connection, on ports that the kernel chooses. Keys are of
// one run, and come in clear: they protect nothing else.
func ServeWire(ctx context.Context, address string, say io.Writer) error {
	if !isAddress(address) {
		return &OptionError{"listen", fmt.Sprintf("%q is not an address and a port, such as 192.0.2.1:7450 or :7450", address)}
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	if _, err := fmt.Fprintf(say, "listening on %v\n", l.Addr()); err != nil {
		return err
	}
	drivers, failed := make(chan net.Conn), make(chan error, 2)
	var serving atomic.Value // the driver's address
	go func() {
		for conn := range drivers {
			serving.Store(conn.RemoteAddr().String())
			if err := serveDriver(ctx, conn, say); err != nil {
				failed <- err
				return
			}
		}
	}()
	go func() {
		for {
			conn, err := l.Accept()
			if errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) {
				// Those that wait are told before long, and hang up.
				select {
				case <-time.After(patience / 10):
				case <-ctx.Done():
				}
				continue
			}
			if err != nil {
				failed <- err
				return
			}
			go func() {
				select {
				case drivers <- conn:
				case <-time.After(patience):
					line, _ := json.Marshal(response{Err: fmt.Sprintf("it is busy with a measurement from %v", serving.Load())})
					conn.Write(append(line, '\n'))
					conn.Close()
				}
			}()
		}
	}()
	select {
	case err = <-failed:
	case <-ctx.Done():
	}
	if ctx.Err() != nil {
		return nil
	}
	return err
}

// serveDriver returns an error only where nothing can be said any more.
func serveDriver(ctx context.Context, conn net.Conn, say io.Writer) error {
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	// A driver whose host is gone keeps others waiting no longer than its data would.
	if c, ok := conn.(syscall.Conn); ok {
		if raw, err := c.SyscallConn(); err == nil {
			_ = raw.Control(func(fd uintptr) { _ = impatient(int(fd)) }) // else the system's patience
		}
	}
	// Who says nothing keeps others waiting; a driver that has begun measures for
	// as long as it likes.
	conn.SetReadDeadline(time.Now().Add(setupTime))
	e := &farEnd{local: addrOf(conn.LocalAddr()), peer: addrOf(conn.RemoteAddr())}
	e.greeted = func() { conn.SetReadDeadline(time.Time{}) }
	outcome := "done"
	if err := serve(conn, conn, e); err != nil && !errors.Is(err, net.ErrClosed) {
		outcome = err.Error()
	}
	_, err := fmt.Fprintf(say, "%v: %s\n", conn.RemoteAddr(), outcome)
	return err
}
