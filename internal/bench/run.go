package bench

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"golang.org/x/sys/unix"
)

// work is what both ends do over some links until the driver sends the last
// message.
type work struct {
	// Stream: messages of chunk bytes one after the other, on all links, the
	// number received sent back after the last one. Else on the first link
	// one message of Size bytes at a time, 8 bytes back for each.
	Stream bool
	Size   int
	Poll   bool
	Verify Verify
}

// Verify says how much of what arrives is compared with what was sent.
type Verify string

const (
	VerifyAll    Verify = "all"    // each byte
	VerifySample Verify = "sample" // each byte of every 16th message
	VerifyNone   Verify = "none"   // a bare floor: the last message only is recognized
)

func (v Verify) covers(n uint64) bool {
	return v == VerifyAll || v == VerifySample && n%16 == 0
}

// compares: the other end compares round trip n for so long that the next one
// would show it. It says so by one more byte when it has done that, which the
// driver waits for off the clock.
func (w work) compares(n uint64) bool { return w.Size > 4096 && w.Verify.covers(n) }

func (w work) waiting(links int) waiting {
	switch {
	case w.Poll:
		return polling
	case w.Stream && links > 1: // round trips have one link at work
		return parked
	}
	return sleeping
}

// besideScheduler lets the rest of the process run where a thread sleeps in recv
// outside of the Go scheduler's sight: with one processor for Go it would stop all
// others, and a garbage collection that begins meanwhile waits for it, and all else for
// that. What such a thread waits for may never come, and then nobody could end it. Links
// that allocate need the collector; while they wait they do not.
func besideScheduler(links []link, w work) (undo func()) {
	if w.waiting(len(links)) != sleeping {
		return func() {}
	}
	giveBack := withProcessors(2)
	if allocates(links[0]) {
		return giveBack
	}
	percent := debug.SetGCPercent(-1)
	return func() {
		debug.SetGCPercent(percent)
		giveBack()
	}
}

func allocates(l link) bool {
	switch l := l.(type) {
	case *rawLink:
		return false
	case *framed:
		_, kernel := l.d.(*algDigest)
		return kernel
	}
	return true
}

// tally is what one end has seen of a work.
type tally struct {
	bytes   int64
	latency *hdrhistogram.Histogram // of round trips, at the driver
	took    time.Duration           // at the driver: a stream, or the round trips that latency has
	peak    int64                   // bytes that the kernel held for all sockets
}

// leastRounds is how many round trips a figure is made of at least: two ends
// that poll for one busy processor may have to wait for long.
const leastRounds = 10

// drive is the driver's side of a work: for d, of which the first tenth warms
// up and does not count into the round trips.
func drive(links []link, w work, d time.Duration) (t tally, err error) {
	for _, l := range links {
		l.socket().wait = w.waiting(len(links))
	}
	defer besideScheduler(links, w)()
	stalled := watchProgress(links, silentTime)
	done := watchSockets(links)
	if w.Stream {
		t, err = driveStream(links, w, d)
	} else {
		t, err = driveRounds(links[0], w, d)
	}
	t.peak = done()
	if stalled() && err != nil {
		err = errSilent // the rest follows from it
	}
	return t, err
}

func driveRounds(l link, w work, d time.Duration) (t tally, err error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	p, err := newPattern(w.Size)
	if err != nil {
		return t, err
	}
	defer p.free()
	t.latency = newHistogram()
	var reply [8]byte
	var warm time.Duration // since when round trips are recorded
	base := time.Now()
	for n := uint64(0); ; n++ {
		begin := time.Since(base)
		message := p.message(n)
		last := begin > d && t.latency.TotalCount() >= leastRounds
		if last {
			message = p.ending(n)
		}
		if err := l.send(message); err != nil {
			return t, err
		}
		if err := full(l, reply[:]); err != nil {
			return t, err
		}
		end := time.Since(base)
		if got := binary.LittleEndian.Uint64(reply[:]); got != n {
			return t, fmt.Errorf("message %d was answered with %d", n, got)
		}
		t.bytes += int64(w.Size)
		if w.compares(n) {
			if err := full(l, reply[:1]); err != nil {
				return t, err
			}
		}
		if last {
			t.took = begin - warm // it is not recorded either
			return t, nil
		}
		if begin < d/10 {
			warm = end
			continue
		}
		record(t.latency, end-begin)
	}
}

func driveStream(links []link, w work, d time.Duration) (t tally, err error) {
	p, err := newPattern(chunk)
	if err != nil {
		return t, err
	}
	defer p.free()
	p.ending(0)
	errs := make([]error, len(links))
	counts := make([]uint64, len(links))
	var wg sync.WaitGroup
	base := time.Now()
	for i, l := range links {
		wg.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			counts[i], errs[i] = sendStream(l, p, base, d)
		})
	}
	wg.Wait()
	t.took = time.Since(base)
	for _, n := range counts {
		t.bytes += int64(n) * chunk
	}
	return t, errors.Join(errs...)
}

// sendStream returns how many messages the other end has taken.
func sendStream(l link, p *pattern, base time.Time, d time.Duration) (n uint64, err error) {
	for ; time.Since(base) < d; n++ {
		if err := l.send(p.message(n)); err != nil {
			return n, err
		}
	}
	// Not p.last: the links share it, and end at different messages.
	ending := append([]byte{0}, p.message(n)[1:]...)
	n++
	if err := l.send(ending); err != nil {
		return n, err
	}
	var reply [8]byte
	if err := full(l, reply[:]); err != nil {
		return n, err
	}
	if got := binary.LittleEndian.Uint64(reply[:]); got != n {
		return n, fmt.Errorf("of %d messages the other end counts %d", n, got)
	}
	return n, nil
}

// answer is the other end's side of a work.
func answer(links []link, w work) (t tally, err error) {
	for _, l := range links {
		l.socket().wait = w.waiting(len(links))
	}
	defer besideScheduler(links, w)()
	size := w.Size
	if w.Stream {
		size = chunk
	} else {
		links = links[:1]
	}
	p, err := newPattern(size)
	if err != nil {
		return t, err
	}
	defer p.free()
	done := watchSockets(links)
	var wg sync.WaitGroup
	errs := make([]error, len(links))
	counts := make([]int64, len(links))
	for i, l := range links {
		wg.Go(func() {
			runtime.LockOSThread()
			defer runtime.UnlockOSThread()
			if w.Stream {
				counts[i], errs[i] = takeStream(l, p, w.Verify)
			} else {
				counts[i], errs[i] = answerRounds(l, p, w)
			}
			if errs[i] != nil {
				l.socket().interrupt() // the driver need not wait
			}
		})
	}
	wg.Wait()
	t.peak = done()
	for _, n := range counts {
		t.bytes += n
	}
	return t, errors.Join(errs...)
}

// answerRounds compares after it has answered: that is not the wire's time.
func answerRounds(l link, p *pattern, w work) (bytes int64, err error) {
	got, err := newBuffer(p.size)
	if err != nil {
		return 0, err
	}
	defer got.free()
	var reply [8]byte
	for n := uint64(0); ; n++ {
		if err := full(l, got); err != nil {
			return bytes, err
		}
		binary.LittleEndian.PutUint64(reply[:], n)
		if err := l.send(reply[:]); err != nil {
			return bytes, err
		}
		bytes += int64(len(got))
		if w.Verify.covers(n) {
			if err := p.check(n, 0, got); err != nil {
				return bytes, err
			}
		}
		if w.compares(n) {
			if err := l.send(reply[:1]); err != nil {
				return bytes, err
			}
		}
		if got[0] == 0 {
			return bytes, nil
		}
	}
}

// takeStream takes what is there, as a receiver would, whatever the bounds of
// the messages.
func takeStream(l link, p *pattern, v Verify) (bytes int64, err error) {
	buf, err := newBuffer(drain)
	if err != nil {
		return 0, err
	}
	defer buf.free()
	var n uint64  // message
	var at int    // in it
	var last bool // it is the last one
	for {
		k, err := l.some(buf)
		if err != nil {
			return bytes, err
		}
		bytes += int64(k)
		for got := buf[:k]; len(got) > 0; {
			piece := got[:min(len(got), chunk-at)]
			got = got[len(piece):]
			if at == 0 {
				last = piece[0] == 0
			}
			if v.covers(n) {
				if err := p.check(n, at, piece); err != nil {
					return bytes, err
				}
			}
			if at += len(piece); at < chunk {
				continue
			}
			at, n = 0, n+1
			if last {
				if len(got) > 0 {
					return bytes, fmt.Errorf("%d bytes after the last message", len(got))
				}
				return bytes, l.send(binary.LittleEndian.AppendUint64(nil, n))
			}
		}
	}
}

// watchSockets looks from time to time at what the kernel holds for the
// sockets, until the function that it returns is called: that returns the most.
func watchSockets(links []link) (done func() int64) {
	stop, end := make(chan struct{}), make(chan int64)
	go func() {
		var most int64
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-stop:
				end <- most
				return
			}
			var now int64
			for _, l := range links {
				now += socketMemory(l.socket().fd)
			}
			most = max(most, now)
		}
	}()
	return func() int64 {
		close(stop)
		return <-end
	}
}

// watchProgress interrupts links on which nothing has moved for so long, however
// slow they are, until the function that it returns is called: that says whether it
// has.
func watchProgress(links []link, limit time.Duration) (stalled func() bool) {
	stop, end := make(chan struct{}), make(chan bool)
	go func() {
		tick := time.NewTicker(limit / 20)
		defer tick.Stop()
		var moved uint64
		since := time.Now()
		cut := false
		for {
			select {
			case <-tick.C:
			case <-stop:
				end <- cut
				return
			}
			var now uint64
			for _, l := range links {
				if i, err := unix.GetsockoptTCPInfo(l.socket().fd, unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
					now += i.Bytes_acked + i.Bytes_received
				}
			}
			if now != moved {
				moved, since = now, time.Now()
			} else if !cut && time.Since(since) > limit {
				cut = true
				for _, l := range links {
					l.socket().interrupt()
				}
			}
		}
	}()
	return func() bool {
		close(stop)
		return <-end
	}
}
