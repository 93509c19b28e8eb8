package faultwire

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"sync"

	"github.com/vishvananda/netns"
)

// Documentation and unique-local prefixes: an address that leaks into a log is
// recognisable, and no route of the machine is in the way.
var (
	addrA4 = netip.MustParsePrefix("198.51.100.1/24")
	addrB4 = netip.MustParsePrefix("198.51.100.2/24")
	addrA6 = netip.MustParsePrefix("fd6e:766d:6d::1/64")
	addrB6 = netip.MustParsePrefix("fd6e:766d:6d::2/64")
)

// Host is one end of the wire: a network namespace with a loopback and one
// device.
type Host struct {
	Name string
	// Addr is the IPv4 address of this end.
	Addr netip.Addr
	// Addr6 is the IPv6 address; not valid where the kernel has IPv6 off.
	Addr6 netip.Addr

	port *port

	mu sync.RWMutex // guards ns: readers enter the namespace, the writer closes it
	ns netns.NsHandle
}

// Do calls f on the caller's goroutine, on an OS thread that is inside the
// namespace. A socket that f creates and a process that f starts stay there; a
// goroutine that f starts does not. Calls nest.
//
// While f runs, /proc/thread-self/net shows the namespace; /proc/net is a link
// to the main thread's and may show another.
func (h *Host) Do(f func() error) (err error) {
	runtime.LockOSThread()
	back, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("faultwire: this thread's namespace: %w", err)
	}
	if err := h.enter(); err != nil {
		runtime.UnlockOSThread()
		return errors.Join(err, back.Close())
	}
	// Deferred so that a panic and runtime.Goexit (a test's Fatal) return too.
	defer func() {
		if e := netns.Set(back); e != nil {
			// The thread stays locked and ends with this goroutine: no other
			// goroutine may ever run on it.
			err = errors.Join(err, fmt.Errorf("faultwire: leaving the namespace: %w", e))
		} else {
			runtime.UnlockOSThread()
		}
		err = errors.Join(err, back.Close())
	}()
	return f()
}

func (h *Host) enter() error {
	h.mu.RLock()
	defer h.mu.RUnlock()
	if !h.ns.IsOpen() {
		return ErrClosed
	}
	if err := netns.Set(h.ns); err != nil {
		return fmt.Errorf("faultwire: entering namespace %s: %w", h.Name, err)
	}
	return nil
}

// Listen listens inside the namespace.
func (h *Host) Listen(ctx context.Context, lc *net.ListenConfig, network, address string) (l net.Listener, err error) {
	err = h.Do(func() error {
		l, err = lc.Listen(ctx, network, address)
		return err
	})
	return l, err
}

// Dial connects from inside the namespace. The address is a literal: a name
// would be resolved, and of two families one dialled, on other goroutines.
func (h *Host) Dial(ctx context.Context, d *net.Dialer, network, address string) (c net.Conn, err error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("faultwire: dial: %w", err)
	}
	err = h.Do(func() error {
		c, err = d.DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Start starts a process inside the namespace: a child begins where the thread
// is that forks it. The caller waits for it as usual, from anywhere.
func (h *Host) Start(cmd *exec.Cmd) error { return h.Do(cmd.Start) }

// Run starts a process inside the namespace and waits for it.
func (h *Host) Run(cmd *exec.Cmd) error {
	if err := h.Start(cmd); err != nil {
		return err
	}
	return cmd.Wait()
}

func (h *Host) close() error {
	err := h.port.close()
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.ns.IsOpen() {
		err = errors.Join(err, h.ns.Close())
	}
	return err
}
