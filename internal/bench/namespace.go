package bench

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// wirePair is two network namespaces with a veth between them. Nothing of it
// has a name outside of this process and its child, and all goes with them.
type wirePair struct {
	ns   [2]netns.NsHandle
	addr [2]netip.Addr
}

func newWirePair(mtu int) (_ *wirePair, err error) {
	w := &wirePair{
		ns:   [2]netns.NsHandle{netns.None(), netns.None()},
		addr: [2]netip.Addr{netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("198.18.0.2")},
	}
	defer func() {
		if err != nil {
			w.close()
		}
	}()
	for i := range w.ns {
		if w.ns[i], err = newNamespace(); err != nil {
			if errors.Is(err, unix.EPERM) {
				err = fmt.Errorf("%w: run it as root", err)
			}
			return nil, fmt.Errorf("a network namespace: %w", err)
		}
	}
	here, err := netlink.NewHandleAt(w.ns[0])
	if err != nil {
		return nil, err
	}
	defer here.Close()
	there, err := netlink.NewHandleAt(w.ns[1])
	if err != nil {
		return nil, err
	}
	defer there.Close()
	const name = "veth0"
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MTU = name, mtu
	err = here.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name, PeerMTU: uint32(mtu), PeerNamespace: netlink.NsFd(w.ns[1])})
	if err != nil {
		return nil, fmt.Errorf("a veth of MTU %d: %w", mtu, err)
	}
	for i, h := range []*netlink.Handle{here, there} {
		dev, err := h.LinkByName(name)
		if err != nil {
			return nil, err
		}
		ip := &netlink.Addr{IPNet: &net.IPNet{IP: w.addr[i].AsSlice(), Mask: net.CIDRMask(30, 32)}}
		if err := errors.Join(h.AddrAdd(dev, ip), h.LinkSetUp(dev)); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	return w, nil
}

func (w *wirePair) close() {
	for i := range w.ns {
		if w.ns[i].IsOpen() {
			_ = w.ns[i].Close()
		}
	}
}

// newNamespace makes a namespace on a thread that ends with it.
func newNamespace() (ns netns.NsHandle, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked: the thread is in the namespace
		ns, err = netns.New()
	}()
	<-done
	return ns, err
}

// inNamespace calls f on a thread inside ns, or as it is where ns is not open.
func inNamespace(ns netns.NsHandle, f func() error) (err error) {
	if !ns.IsOpen() {
		return f()
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // never unlocked, as above
		if err = netns.Set(ns); err == nil {
			err = f()
		}
	}()
	<-done
	return err
}
