package transport

import "net/netip"

// Plain is TCP without signatures, for tests and for links that are trusted
// to deliver to nobody else. TCP's own checksum misses some corruption: the
// layer above must find it. The peer's address is still checked after accept.
type Plain struct{ *endpoint }

var _ Transport = (*Plain)(nil)

// NewPlain makes the unsigned transport to peer.
func NewPlain(peer netip.Addr, opt Options) (*Plain, error) {
	e, err := newEndpoint(NamePlain, peer, opt)
	if err != nil {
		return nil, err
	}
	return &Plain{endpoint: e}, nil
}
