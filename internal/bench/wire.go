package bench

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
)

// WireOptions say what [Wire] measures.
type WireOptions struct {
	Transports  []Transport
	Sizes       []int         // of round trips' messages
	Connections []int         // of streams
	Duration    time.Duration // of each measurement
	// Verify is for the streams that are timed: comparing costs the receiver
	// as much as a tenth of what plain TCP does. Round trips, where it is
	// not on the clock, and each stream's warm-up are compared wholly.
	Verify Verify
	// Placement is of the round trips' ends, where both are on this machine;
	// streams are Free. "" and Auto are Apart, with two processors.
	Placement Placement
	// Client is the control address of a server at the other host; "": a
	// child of this process on loopback, run by Program.
	Client  string
	Program []string
	// MTUs: in place of loopback, between two network namespaces with a
	// veth, once for each.
	MTUs []int
	// Progress, if not nil, is told before each measurement.
	Progress func(done, total int, what string)
}

// DefaultSizes and DefaultConnections are what an evaluation needs.
var (
	DefaultSizes       = []int{8, 64, 512, 4 << 10, 64 << 10, 1 << 20}
	DefaultConnections = []int{1, 2, 4, 8}
)

// Check finds what [Wire] would refuse.
func (o *WireOptions) Check() error {
	bad := func(option, format string, args ...any) error {
		return &OptionError{option, fmt.Sprintf(format, args...)}
	}
	for _, n := range o.Sizes {
		if n < 8 || n > maxMessage {
			return bad("sizes", "%d is not from 8 bytes to %d", n, maxMessage)
		}
	}
	for _, n := range o.Connections {
		if n < 1 || n > maxConnections {
			return bad("connections", "%d is not from 1 to %d", n, maxConnections)
		}
	}
	for _, n := range o.MTUs {
		if n < 576 || n > 65535 {
			return bad("mtu", "%d is not from 576 to 65535", n)
		}
	}
	switch {
	case len(o.Transports) == 0 || len(o.Sizes)+len(o.Connections) == 0:
		return bad("transports", "there is nothing to measure")
	case twice(o.Transports):
		return bad("transports", "%v has one twice", o.Transports)
	case twice(o.Sizes):
		return bad("sizes", "%v has one twice", o.Sizes)
	case twice(o.Connections):
		return bad("connections", "%v has one twice", o.Connections)
	case twice(o.MTUs):
		return bad("mtu", "%v has one twice", o.MTUs)
	case o.Duration < time.Millisecond:
		return bad("duration", "%v is shorter than a millisecond", o.Duration)
	case o.Verify != VerifyAll && o.Verify != VerifySample:
		return bad("verify", "%q is not %s or %s", o.Verify, VerifyAll, VerifySample)
	case !o.Placement.known():
		return bad("placement", "%q is not auto, apart, together or free", o.Placement)
	case o.Client != "" && !isAddress(o.Client):
		return bad("client", "%q is not an address and a port, such as 192.0.2.1:7450", o.Client)
	case o.Client != "" && len(o.MTUs) > 0:
		return bad("netns", "it is for this machine alone, not for a server at %s", o.Client)
	case o.Client != "" && o.Placement != Auto && o.Placement != "":
		return bad("placement", "it is for ends on this machine, not for a server at %s", o.Client)
	}
	return nil
}

// isAddress: the text has a host, which may be empty, and a port.
func isAddress(text string) bool {
	_, port, err := net.SplitHostPort(text)
	if err == nil && port != "" {
		_, err = net.LookupPort("tcp", port)
	}
	return err == nil && port != ""
}

// twice: the list has something twice.
func twice[T comparable](list []T) bool {
	for i, v := range list {
		if slices.Contains(list[:i], v) {
			return true
		}
	}
	return false
}

func (o *WireOptions) placement() Placement {
	switch {
	case o.Placement != Auto && o.Placement != "":
		return o.Placement
	case runtime.NumCPU() > 1:
		return Apart
	}
	return Free
}

// WireResult is what [Wire] measured.
type WireResult struct {
	Driver   *Host      `json:"driver"`
	Other    *Host      `json:"other"`
	Seconds  float64    `json:"seconds_each"`
	Verified Verify     `json:"verified"` // of the timed streams; the rest is all
	Paths    []WirePath `json:"paths"`
}

// WirePath is the transports over one path.
type WirePath struct {
	Name       string          `json:"path"`
	MTU        int             `json:"mtu"`
	Placement  Placement       `json:"placement"`          // of the round trips' ends
	Congestion string          `json:"congestion_control"` // of the data's sockets
	Transports []WireTransport `json:"transports"`
}

// WireTransport is one transport's figures, or why there are none.
type WireTransport struct {
	Transport  Transport    `json:"transport"`
	Skipped    string       `json:"skipped,omitempty"`
	RoundTrips []RoundTrip  `json:"round_trips,omitempty"`
	Throughput []Throughput `json:"throughput,omitempty"`
	// Most resident memory of each process.
	PeakDriver int64 `json:"peak_rss_driver_bytes,omitempty"`
	PeakOther  int64 `json:"peak_rss_other_bytes,omitempty"`
}

// RoundTrip is messages of Size bytes one way, 8 bytes back.
type RoundTrip struct {
	Size int    `json:"size"`
	Wait string `json:"wait"` // sleeping or polling
	Latency
	HDR string `json:"hdr"` // the histogram of nanoseconds, in HdrHistogram's V2 compressed form
}

// Throughput is a stream over Connections, sleeping.
type Throughput struct {
	Connections int     `json:"connections"`
	MB          float64 `json:"mb_per_s"`
	Driver      EndUse  `json:"driver"` // sends
	Other       EndUse  `json:"other"`  // receives
}

// EndUse is what one end uses for each GiB, but for its socket memory.
type EndUse struct {
	User     float64 `json:"user_s_per_gib"`
	System   float64 `json:"system_s_per_gib"`
	Softirq  float64 `json:"machine_softirq_s_per_gib"` // of the whole machine
	Switches float64 `json:"context_switches_per_gib"`
	Calls    float64 `json:"system_calls_per_gib"`
	Sockets  int64   `json:"socket_memory_bytes"` // most at a time, in the kernel
}

func endUse(u usage, bytes, sockets int64) EndUse {
	gib := float64(bytes) / (1 << 30)
	return EndUse{
		u.User.Seconds() / gib, u.System.Seconds() / gib, u.Softirq.Seconds() / gib,
		float64(u.Switches) / gib, float64(u.Calls) / gib, sockets,
	}
}

// Missing says what this machine lacks for the transport; nil: nothing.
func (t Transport) Missing() *UnsupportedError {
	_, err := newMaker(setup{Transport: t})
	var missing *UnsupportedError
	errors.As(err, &missing)
	return missing
}

// Wire measures transports against each other. It verifies what arrives: an
// error ends it.
func Wire(ctx context.Context, o WireOptions) (*WireResult, error) {
	if err := o.Check(); err != nil {
		return nil, err
	}
	host, err := ThisHost()
	if err != nil {
		return nil, err
	}
	w := &wire{o: o, r: &WireResult{Driver: host, Seconds: o.Duration.Seconds(), Verified: o.Verify}, silent: silentTime}
	w.total = max(1, len(o.MTUs)) * len(o.Transports) * (2*len(o.Sizes) + len(o.Connections))
	switch {
	case o.Client != "":
		err = w.remote(ctx)
	case len(o.MTUs) > 0:
		for _, mtu := range o.MTUs {
			if err = w.namespaces(ctx, mtu); err != nil {
				break
			}
		}
	default:
		err = w.local(ctx, "loopback", 0, nil)
	}
	if ctx.Err() != nil {
		err = ctx.Err() // the rest follows from it
	}
	if err != nil {
		return nil, err
	}
	return w.r, nil
}

// wire is one run.
type wire struct {
	o           WireOptions
	r           *WireResult
	silent      time.Duration // after which a server has failed
	done, total int
}

func (w *wire) remote(ctx context.Context) error {
	d := net.Dialer{Timeout: setupTime, KeepAlive: -1, Control: func(_, _ string, c syscall.RawConn) error {
		var set error
		err := c.Control(func(fd uintptr) { set = impatient(int(fd)) })
		return errors.Join(err, set)
	}}
	conn, err := d.DialContext(ctx, "tcp", w.o.Client)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	c := &controller{in: bufio.NewReader(&answers{Conn: conn, silent: w.silent}), out: conn, ns: netns.None(), local: addrOf(conn.LocalAddr()), peer: addrOf(conn.RemoteAddr())}
	if err := w.hello(c); err != nil {
		return err
	}
	return w.path(ctx, c, WirePath{Name: c.local.String() + " to " + c.peer.String(), Placement: Free})
}

// answers is what a server says, all of which it says at once. Of one that is stopped
// the kernel goes on to answer for the connection, which would last for ever.
type answers struct {
	net.Conn
	silent time.Duration // after which it has failed
	err    error
}

// Read implements io.Reader.
func (a *answers) Read(p []byte) (n int, err error) {
	if a.err == nil {
		a.SetReadDeadline(time.Now().Add(a.silent))
		if n, a.err = a.Conn.Read(p); errors.Is(a.err, os.ErrDeadlineExceeded) {
			a.err = fmt.Errorf("the other end has said nothing for %v: see whether its process is stopped, and start it again", a.silent)
		}
	}
	return n, a.err // not asked again, it would take as long again
}

func addrOf(a net.Addr) netip.Addr {
	t, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Addr{}
	}
	return t.AddrPort().Addr().Unmap()
}

func (w *wire) namespaces(ctx context.Context, mtu int) error {
	p, err := newWirePair(mtu)
	if err != nil {
		return err
	}
	defer p.close()
	return w.local(ctx, "veth between network namespaces", mtu, p)
}

// local has the other end in a child, in the other namespace of p if p is not
// nil.
func (w *wire) local(ctx context.Context, name string, mtu int, p *wirePair) (err error) {
	ns := netns.None()
	if p != nil {
		ns = p.ns[1]
	}
	c, err := startChild(w.o.Program, ns)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, c.end()) }()
	if p != nil {
		c.ns, c.local, c.peer = p.ns[0], p.addr[0], p.addr[1]
	}
	if err := w.hello(c.controller); err != nil {
		return err
	}
	return w.path(ctx, c.controller, WirePath{Name: name, MTU: mtu, Placement: w.o.placement()})
}

func (w *wire) hello(c *controller) error {
	a, err := c.ask(request{Op: opHello, Local: c.peer, Peer: c.local})
	w.r.Other = a.Host
	return err
}

func (w *wire) path(ctx context.Context, c *controller, p WirePath) error {
	for _, t := range w.o.Transports {
		m, err := w.transport(ctx, c, &p, t)
		if err != nil {
			return fmt.Errorf("%s: %w", t, err)
		}
		p.Transports = append(p.Transports, m)
	}
	w.r.Paths = append(w.r.Paths, p)
	return nil
}

func (w *wire) transport(ctx context.Context, c *controller, p *WirePath, t Transport) (m WireTransport, err error) {
	m.Transport = t
	end := w.done + 2*len(w.o.Sizes) + len(w.o.Connections)
	for _, n := range append([]int{0}, w.o.Connections...) {
		if err = w.links(ctx, c, p, &m, n); err != nil {
			break
		}
	}
	w.done = end
	if missing := (*UnsupportedError)(nil); errors.As(err, &missing) {
		m.Skipped, err = missing.Reason, nil
	}
	return m, err
}

// links measures a stream over so many connections, or round trips for 0.
func (w *wire) links(ctx context.Context, c *controller, p *WirePath, m *WireTransport, connections int) error {
	s, err := c.open(ctx, setup{Transport: m.Transport, Connections: max(1, connections), Key: []byte(rand.Text())})
	if err != nil {
		return err
	}
	defer s.close()
	if p.MTU, p.Congestion, err = pathOf(s.links[0].socket().fd); err != nil {
		return err
	}
	if connections > 0 {
		err = w.stream(s, m, connections)
	} else {
		err = w.roundTrips(s, p.Placement, m)
	}
	if err != nil {
		return err
	}
	a, err := c.ask(request{Op: opPeak})
	m.PeakDriver, m.PeakOther = max(m.PeakDriver, peakResident()), max(m.PeakOther, a.Peak)
	return err
}

func (w *wire) roundTrips(s *session, p Placement, m *WireTransport) (err error) {
	unplace, err := s.c.place(p)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unplace()) }()
	for _, wait := range []string{"sleeping", "polling"} {
		for _, size := range w.o.Sizes {
			w.say("%s, round trips of %d bytes, %s", m.Transport, size, wait)
			r, err := s.run(work{Size: size, Poll: wait == "polling", Verify: VerifyAll}, w.o.Duration)
			if err != nil {
				return fmt.Errorf("round trips of %d bytes, %s: %w", size, wait, err)
			}
			hdr, err := encode(r.latency)
			if err != nil {
				return err
			}
			m.RoundTrips = append(m.RoundTrips, RoundTrip{size, wait, latencyOf(r.latency), hdr})
		}
	}
	return nil
}

func (w *wire) stream(s *session, m *WireTransport, connections int) error {
	w.say("%s, stream over %d connections", m.Transport, connections)
	// The first one opens the congestion window, and its figures are not
	// looked at.
	var r outcome
	for _, run := range []struct {
		d time.Duration
		v Verify
	}{{w.o.Duration / 10, VerifyAll}, {w.o.Duration, w.o.Verify}} {
		var err error
		if r, err = s.run(work{Stream: true, Size: chunk, Verify: run.v}, run.d); err != nil {
			return fmt.Errorf("stream over %d connections: %w", connections, err)
		}
	}
	m.Throughput = append(m.Throughput, Throughput{
		connections, float64(r.bytes) / 1e6 / r.took.Seconds(),
		endUse(r.here, r.bytes, r.peak), endUse(r.there, r.bytes, r.peakThere),
	})
	return nil
}

func (w *wire) say(format string, args ...any) {
	if w.o.Progress != nil {
		w.o.Progress(w.done, w.total, fmt.Sprintf(format, args...))
	}
	w.done++
}
