package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
)

// ServeWire is the other end of [Wire] on a host of its own, until ctx ends. It
// serves one driver after the other; the data's connections are between the
// same addresses as the control connection, on ports that the kernel chooses.
// Keys are of one run, and come in clear: they protect nothing else.
func ServeWire(ctx context.Context, address string, say io.Writer) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return err
	}
	defer l.Close()
	defer context.AfterFunc(ctx, func() { l.Close() })()
	if _, err := fmt.Fprintf(say, "listening on %v\n", l.Addr()); err != nil {
		return err
	}
	for {
		conn, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		if err := serveDriver(ctx, conn, say); err != nil {
			return err
		}
	}
}

// serveDriver returns an error only where nothing can be said any more.
func serveDriver(ctx context.Context, conn net.Conn, say io.Writer) error {
	var once sync.Once
	hangUp := func() { once.Do(func() { conn.Close() }) }
	defer hangUp()
	defer context.AfterFunc(ctx, hangUp)()
	outcome := "done"
	err := serve(conn, conn, &farEnd{local: addrOf(conn.LocalAddr()), peer: addrOf(conn.RemoteAddr())})
	if err != nil && !errors.Is(err, net.ErrClosed) {
		outcome = err.Error()
	}
	_, err = fmt.Fprintf(say, "%v: %s\n", conn.RemoteAddr(), outcome)
	return err
}
