package faultwire

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"runtime"
	"slices"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	// addrGenNone keeps a device without a link-local address, and so without
	// the router solicitations that would be in every capture.
	addrGenNone = 1
	// ipv6Timeout bounds the wait for an address to become usable.
	ipv6Timeout = 5 * time.Second
)

// newHost creates a namespace with loopback, device and addresses.
func newHost(name string, a4, a6 netip.Prefix, mtu int) (*Host, error) {
	h := &Host{Name: name, Addr: a4.Addr(), ns: netns.None()}
	errc := make(chan error, 1)
	go func() { errc <- h.build(a4, a6, mtu) }()
	if err := <-errc; err != nil {
		return nil, fmt.Errorf("faultwire: host %s: %w", name, err)
	}
	return h, nil
}

// build runs on a goroutine of its own, because the thread that it takes into
// the new namespace must end where it cannot be brought back.
func (h *Host) build(a4, a6 netip.Prefix, mtu int) (err error) {
	runtime.LockOSThread()
	back, err := netns.Get()
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("this thread's namespace: %w", err)
	}
	defer func() {
		if e := netns.Set(back); e == nil {
			runtime.UnlockOSThread()
		} else {
			err = errors.Join(err, fmt.Errorf("leaving the namespace: %w", e))
		}
		err = errors.Join(err, back.Close())
		if err != nil && h.ns.IsOpen() {
			err = errors.Join(err, h.ns.Close())
		}
		if err != nil && h.port != nil {
			err = errors.Join(err, h.port.close())
		}
	}()
	if h.ns, err = netns.New(); err != nil {
		return permission("a new network namespace", err)
	}
	if h.port, err = openTUN(h.Name); err != nil {
		return err
	}
	return h.configure(a4, a6, mtu)
}

func (h *Host) configure(a4, a6 netip.Prefix, mtu int) error {
	handle, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return permission("netlink", err)
	}
	defer handle.Close()
	lo, err := handle.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	if err := handle.LinkSetUp(lo); err != nil {
		return permission("loopback up", err)
	}
	dev, err := handle.LinkByName(deviceName)
	if err != nil {
		return fmt.Errorf("device: %w", err)
	}
	if err := handle.LinkSetMTU(dev, mtu); err != nil {
		return permission(fmt.Sprintf("MTU %d", mtu), err)
	}
	if err := handle.LinkSetTxQLen(dev, queueLen); err != nil {
		return permission("queue length", err)
	}
	// A kernel without IPv6 refuses this; IPv4 goes on alone.
	ipv6 := handle.LinkSetIP6AddrGenMode(dev, addrGenNone) == nil
	if err := handle.LinkSetUp(dev); err != nil {
		return permission("device up", err)
	}
	if err := handle.AddrAdd(dev, address(a4, 0)); err != nil {
		return permission("address "+a4.String(), err)
	}
	if !ipv6 {
		return nil
	}
	return h.configure6(handle, dev, a6)
}

// configure6 adds the IPv6 address and returns when packets to it are received.
// The kernel adds an address at once and its local route later, from a work
// queue; a SYN in between is lost and costs its sender a second.
func (h *Host) configure6(handle *netlink.Handle, dev netlink.Link, a6 netip.Prefix) error {
	routes, err := nl.Subscribe(unix.NETLINK_ROUTE, unix.RTNLGRP_IPV6_ROUTE)
	if err != nil {
		return permission("watch IPv6 routes", err)
	}
	defer routes.Close()
	if handle.AddrAdd(dev, address(a6, unix.IFA_F_NODAD)) != nil {
		return nil // IPv6 is disabled on this device
	}
	limit := unix.NsecToTimeval(ipv6Timeout.Nanoseconds())
	if err := routes.SetReceiveTimeout(&limit); err != nil {
		return fmt.Errorf("watch IPv6 routes: %w", err)
	}
	for {
		messages, _, err := routes.Receive()
		if err != nil {
			return fmt.Errorf("wait for the local route of %v: %w", a6.Addr(), err)
		}
		if slices.ContainsFunc(messages, func(m syscall.NetlinkMessage) bool { return isLocalRoute(m, a6.Addr()) }) {
			h.Addr6 = a6.Addr()
			return nil
		}
	}
}

// isLocalRoute reports whether the message says that packets to the address
// are now received.
func isLocalRoute(m syscall.NetlinkMessage, a netip.Addr) bool {
	if m.Header.Type != unix.RTM_NEWROUTE || len(m.Data) < unix.SizeofRtMsg {
		return false
	}
	if nl.DeserializeRtMsg(m.Data).Type != unix.RTN_LOCAL {
		return false
	}
	attrs, err := nl.ParseRouteAttr(m.Data[unix.SizeofRtMsg:])
	return err == nil && slices.ContainsFunc(attrs, func(r syscall.NetlinkRouteAttr) bool {
		return r.Attr.Type == unix.RTA_DST && bytes.Equal(r.Value, a.AsSlice())
	})
}

func address(p netip.Prefix, flags int) *netlink.Addr {
	return &netlink.Addr{
		IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())},
		Flags: flags,
	}
}

// permission marks what an ordinary user or a kernel without TUN answers.
func permission(step string, err error) error {
	if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.ENXIO) {
		return fmt.Errorf("%w: %s: %w", ErrNotPermitted, step, err)
	}
	return fmt.Errorf("%s: %w", step, err)
}
