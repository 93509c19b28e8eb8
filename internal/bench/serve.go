package bench

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"

	"golang.org/x/sys/unix"
)

// farEnd is the other end of one control connection.
type farEnd struct {
	local, peer netip.Addr
	child       bool // of the driver: it may name files and addresses
	greeted     func()

	maker    *maker
	listener int // -1: none
	links    []link
	undo     func() // gives back processors
	calls    uint64 // when the work began
	before   usage
	result   chan response // of the work that runs
	node     *secondary
	unplace  func() error // nil: it has not been placed
}

var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// serve does what the driver at the other end of in and out asks for, until in
// ends.
func serve(in io.Reader, out io.Writer, e *farEnd) (err error) {
	e.listener = -1
	defer func() { err = errors.Join(err, e.close()) }()
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		var r request
		a := response{}
		if err = json.Unmarshal(lines.Bytes(), &r); err == nil {
			if r.Protocol != protocol {
				err = fmt.Errorf("it speaks protocol %d, not %d: run the same version of nvmmirrord at both ends", protocol, r.Protocol)
			} else {
				a, err = e.do(r)
			}
		}
		if err != nil {
			a.Err = err.Error()
		}
		line, err := json.Marshal(a)
		if err != nil {
			return err
		}
		if _, err := out.Write(append(line, '\n')); err != nil {
			return fmt.Errorf("control connection: %w", err)
		}
	}
	return lines.Err()
}

// ServeChild is the other end where the driver is the parent process, and in
// and out are pipes from and to it.
func ServeChild(in io.Reader, out io.Writer) error {
	return serve(in, out, &farEnd{local: loopback, peer: loopback, child: true})
}

func (e *farEnd) do(r request) (a response, err error) {
	switch {
	case r.Op == opHello:
		if e.child && r.Local.IsValid() {
			e.local, e.peer = r.Local, r.Peer
		}
		if e.greeted != nil {
			e.greeted()
		}
		h, err := ThisHost()
		return response{Host: h}, err
	case r.Op == opListen && r.Setup != nil:
		return e.listen(*r.Setup)
	case r.Op == opAccept && e.listener >= 0:
		return a, e.accept()
	case r.Op == opBegin && r.Work != nil && len(e.links) > 0 && e.result == nil:
		return a, e.begin(*r.Work)
	case r.Op == opResult && e.result != nil:
		a := <-e.result
		e.result = nil
		return a, nil
	case r.Op == opHangUp:
		e.hangUp()
		return a, nil
	case r.Op == opPlace && e.child:
		return a, e.place(r.Processors)
	case r.Op == opPeak:
		return response{Peak: peakResident()}, nil
	case r.Op == opNode && r.Node != nil && e.node == nil && e.child:
		e.node, err = openSecondary(*r.Node)
		return a, err
	case r.Op == opNodeState && e.node != nil:
		s, err := e.node.state(r.Memory)
		return response{State: &s}, err
	case r.Op == opNodeClose && e.node != nil:
		err := e.node.close()
		e.node = nil
		return a, err
	}
	return a, fmt.Errorf("%q does not fit here", r.Op)
}

func (e *farEnd) listen(s setup) (a response, err error) {
	e.hangUp()
	resetPeak()
	if s.Connections < 1 || s.Connections > maxConnections {
		return a, fmt.Errorf("%d connections are not from 1 to %d", s.Connections, maxConnections)
	}
	m, err := newMaker(s)
	var missing *UnsupportedError
	if errors.As(err, &missing) {
		return response{Reason: missing.Reason}, nil
	}
	if err != nil {
		return a, err
	}
	e.maker = m
	e.undo = withProcessors(s.processors())
	e.listener, a.Port, err = listen(e.local, e.peer, s.signingKey())
	a.Pin = m.pin()
	return a, err
}

func (e *farEnd) accept() error {
	defer e.stopListening()
	for range e.maker.s.Connections {
		fd, err := accept(e.listener)
		if err != nil {
			return err
		}
		l, err := e.maker.link(&rawLink{fd: fd}, e.maker.s.Pin, true)
		if err != nil {
			return err
		}
		e.links = append(e.links, l)
		if err := limit(fd, 0); err != nil {
			return err
		}
	}
	return nil
}

func (e *farEnd) begin(w work) (err error) {
	if w.Size < 1 || w.Size > maxMessage && !e.child { // who it is a child of has bounds of its own
		return fmt.Errorf("messages of %d bytes are not from 1 byte to %d", w.Size, maxMessage)
	}
	if e.before, err = used(); err != nil {
		return err
	}
	e.calls = callsOf(e.links)
	e.result = make(chan response, 1)
	go func() {
		t, err := answer(e.links, w)
		after, e2 := used()
		a := response{Bytes: t.bytes, Socket: t.peak, Usage: after.sub(e.before)}
		a.Usage.Calls = callsOf(e.links) - e.calls
		if err := errors.Join(err, e2); err != nil {
			a.Err = err.Error()
		}
		e.result <- a
	}()
	return nil
}

func (e *farEnd) place(processors []int) (err error) {
	if e.unplace != nil {
		err = e.unplace()
		e.unplace = nil
	}
	if err == nil && processors != nil {
		e.unplace, err = runOn(processors)
	}
	return err
}

func (e *farEnd) stopListening() {
	if e.listener >= 0 {
		unix.Close(e.listener)
		e.listener = -1
	}
}

func (e *farEnd) hangUp() {
	e.stopListening()
	for _, l := range e.links {
		l.socket().interrupt()
	}
	if e.result != nil {
		<-e.result
		e.result = nil
	}
	for _, l := range e.links {
		l.close()
	}
	e.links = nil
	if e.undo != nil {
		e.undo()
		e.undo = nil
	}
}

func (e *farEnd) close() error {
	e.hangUp()
	if e.node == nil {
		return nil
	}
	return e.node.close()
}
