package bench

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"time"

	"github.com/vishvananda/netns"
)

// protocol is what the two ends must have in common.
const protocol = 1

// Requests, in the order in which a session makes them.
const (
	opHello     = "hello"
	opListen    = "listen" // answered with a port, and more
	opAccept    = "accept"
	opBegin     = "begin"  // answered before the work begins
	opResult    = "result" // of the work, when it has ended
	opHangUp    = "hang-up"
	opPlace     = "place" // on processors
	opPeak      = "peak"  // most memory since the last opListen
	opNode      = "node"  // be the secondary of a pair
	opNodeState = "node-state"
	opNodeClose = "node-close"
)

type request struct {
	Op       string   `json:"op"`
	Protocol int      `json:"protocol,omitempty"`
	Setup    *setup   `json:"setup,omitempty"`
	Work     *work    `json:"work,omitempty"`
	Node     *nodeJob `json:"node,omitempty"`
	Memory   bool     `json:"memory,omitempty"` // with opNodeState

	Processors []int `json:"processors,omitempty"` // with opPlace; none: as before

	// The other end's own address and the driver's, with opHello to a child.
	Local netip.Addr `json:"local,omitzero"`
	Peer  netip.Addr `json:"peer,omitzero"`
}

type response struct {
	Err    string        `json:"error,omitempty"`
	Host   *Host         `json:"host,omitempty"`
	Port   uint16        `json:"port,omitempty"`
	Pin    []byte        `json:"pin,omitempty"`    // of the server's TLS key
	Reason string        `json:"reason,omitempty"` // why the transport does not work there
	Usage  usage         `json:"usage,omitzero"`
	Bytes  int64         `json:"bytes,omitempty"`
	Socket int64         `json:"socket,omitempty"` // bytes that the kernel held
	Peak   int64         `json:"peak,omitempty"`
	State  *nodeState    `json:"state,omitempty"`
	Took   time.Duration `json:"took,omitempty"`
}

// setup is how links are made.
type setup struct {
	Transport   Transport `json:"transport"`
	Connections int       `json:"connections"`
	Key         []byte    `json:"key,omitempty"` // of this run alone
	Pin         []byte    `json:"pin,omitempty"` // of the driver's TLS key
}

// OtherEndError is what the other end answered.
type OtherEndError struct{ Text string }

func (e *OtherEndError) Error() string { return "the other end: " + e.Text }

// controller is the driver's end of a control connection.
type controller struct {
	in    *bufio.Reader
	out   io.Writer
	local netip.Addr // of the data's connections
	peer  netip.Addr
	ns    netns.NsHandle // the data's sockets are made in, if it is open
}

func (c *controller) ask(r request) (response, error) {
	r.Protocol = protocol
	line, err := json.Marshal(r)
	if err != nil {
		return response{}, err
	}
	if _, err := c.out.Write(append(line, '\n')); err != nil {
		return response{}, fmt.Errorf("control connection: %w", err)
	}
	line, err = c.answer()
	if err != nil {
		if errors.Is(err, io.EOF) {
			err = errors.New("the other end has ended")
		}
		return response{}, fmt.Errorf("control connection: %w", err)
	}
	var a response
	if err := json.Unmarshal(line, &a); err != nil {
		return a, fmt.Errorf("control connection: the other end does not speak the protocol: %w", err)
	}
	if a.Err != "" {
		return a, &OtherEndError{a.Err}
	}
	return a, nil
}

// maxLine is more than a request or an answer takes.
const maxLine = 1 << 20

// answer is a line. What is no other end of ours may never end one.
func (c *controller) answer() (line []byte, err error) {
	for {
		part, err := c.in.ReadSlice('\n')
		if line = append(line, part...); err != bufio.ErrBufferFull {
			return line, err
		}
		if len(line) > maxLine {
			return nil, errors.New("the other end does not speak the protocol: it sends a line without end")
		}
	}
}

// open makes links. A transport that one of the ends has not is an
// [*UnsupportedError].
func (c *controller) open(ctx context.Context, s setup) (_ *session, err error) {
	d, err := newMaker(s)
	if err != nil {
		return nil, err
	}
	s.Pin = d.pin()
	resetPeak()
	a, err := c.ask(request{Op: opListen, Setup: &s})
	if err != nil {
		return nil, err
	}
	if a.Reason != "" {
		return nil, &UnsupportedError{s.Transport, "the other end: " + a.Reason}
	}
	o := &session{c: c, giveBack: withProcessors(s.processors())}
	defer func() {
		if err != nil {
			o.close()
		}
	}()
	var fds []int
	defer func() {
		for _, fd := range fds {
			(&rawLink{fd: fd}).close()
		}
	}()
	for range s.Connections {
		var fd int
		err := inNamespace(c.ns, func() (err error) {
			fd, err = dial(c.local, netip.AddrPortFrom(c.peer, a.Port), s.signingKey())
			return err
		})
		if err != nil {
			return nil, err
		}
		fds = append(fds, fd)
	}
	// Both ends make links of them at the same time: TLS shakes hands.
	made := make(chan error, 1)
	go func() {
		_, err := c.ask(request{Op: opAccept})
		made <- err
	}()
	for len(fds) > 0 {
		fd := fds[0]
		fds = fds[1:] // it is the link's, on failure too
		var l link
		if l, err = d.link(&rawLink{fd: fd}, a.Pin, false); err != nil {
			break
		}
		o.links = append(o.links, l)
		if err = limit(fd, 0); err != nil {
			break
		}
	}
	if e := <-made; e != nil {
		err = e
	}
	if err != nil {
		return nil, err
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		for _, l := range o.links {
			l.socket().interrupt()
		}
	})
	o.undo = func() {
		if !stop() {
			<-interrupted // it must not meet a closed descriptor
		}
	}
	return o, nil
}

// session is links to the other end.
type session struct {
	c     *controller
	links []link
	undo  func()

	giveBack func() // processors
}

// outcome is what both ends have seen of a work.
type outcome struct {
	tally
	here, there usage
	peakThere   int64
}

func (o *session) run(w work, d time.Duration) (r outcome, err error) {
	before, err := used()
	if err != nil {
		return r, err
	}
	calls := callsOf(o.links)
	if _, err := o.c.ask(request{Op: opBegin, Work: &w}); err != nil {
		return r, err
	}
	r.tally, err = drive(o.links, w, d)
	if err != nil {
		for _, l := range o.links {
			l.socket().interrupt() // the other end need not wait
		}
	}
	after, e := used()
	a, there := o.c.ask(request{Op: opResult})
	// What the receiver says against the data explains the rest.
	if err := errors.Join(there, err, e); err != nil {
		return r, err
	}
	if a.Bytes != r.bytes {
		return r, fmt.Errorf("sent %d bytes, the other end got %d", r.bytes, a.Bytes)
	}
	r.here, r.there, r.peakThere = after.sub(before), a.Usage, a.Socket
	r.here.Calls = callsOf(o.links) - calls
	return r, nil
}

func (o *session) close() {
	if o.undo != nil {
		o.undo()
	}
	for _, l := range o.links {
		l.close()
	}
	o.giveBack()
	// Where it cannot be asked any more it has hung up by itself.
	_, _ = o.c.ask(request{Op: opHangUp})
}

func callsOf(links []link) (n uint64) {
	for _, l := range links {
		n += l.socket().calls
	}
	return n
}
