package demo

import (
	"bytes"
	"context"
	"encoding/binary"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/internal/admin"
)

// Each transaction has an id, and a slot of the volume that no other writes
// to: so each can be looked for. The small ones come first.
const (
	smallSlots = 16384
	smallSlot  = 512
	largeSlots = 96
	largeSlot  = 64 << 10
	slots      = smallSlots + largeSlots
)

const writeTime = 10 * time.Second // for a transaction to be acknowledged

// outcome is what the writer knows of a transaction.
type outcome uint8

const (
	notTried     outcome = iota
	refused              // it was not written, says the daemon, or the survivor does not have it
	unknown              // the answer never came: all of it is there, or nothing
	survived             // it was unknown, and the survivor has it: it must stay
	acknowledged         // it must be there, whatever happens
)

// load is the writers' record.
type load struct {
	seed   uint64
	record [slots]entry // each is its writer's until that has ended
	small  ids
	large  ids
}

type entry struct {
	outcome outcome
	lsn     nvmmirror.LSN
}

// ids hands out the ids of one sort of transactions.
type ids struct {
	next, end int64
	taken     atomic.Int64
	acked     atomic.Int64
}

func (i *ids) take() (id int, ok bool) {
	n := i.next + i.taken.Add(1) - 1
	return int(n), n < i.end
}

func newLoad(seed uint64) *load {
	l := &load{seed: seed}
	l.small.end = smallSlots
	l.large.next, l.large.end = smallSlots, slots
	return l
}

func (l *load) acknowledged() int64 { return l.small.acked.Load() + l.large.acked.Load() }

// slotOf is where a transaction's slot lies.
func slotOf(id int) (off int64, size int) {
	if id < smallSlots {
		return int64(id) * smallSlot, smallSlot
	}
	return smallSlots*smallSlot + int64(id-smallSlots)*largeSlot, largeSlot
}

// content is what a transaction writes, at the start of its slot: SplitMix64
// of seed and id. No two are alike, and none is zeros.
func (l *load) content(id int, buf []byte) []byte {
	x := mix(l.seed ^ mix(uint64(id)+1))
	n := largeSlot
	if id < smallSlots {
		n = 64 + 8*int(x%57) // up to 512
	}
	buf = buf[:n]
	for i := 0; i < n; i += 8 {
		x += 0x9e3779b97f4a7c15
		binary.LittleEndian.PutUint64(buf[i:], mix(x)|1)
	}
	return buf
}

func mix(z uint64) uint64 {
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// crew is writers at work, each with a connection of its own.
type crew struct {
	load *load
	wg   sync.WaitGroup
	stop chan struct{}
	// doomed: the daemon is about to be killed, errors are expected.
	doomed atomic.Bool

	mu        sync.Mutex // of what follows
	latencies []time.Duration
	err       error // the first that was not expected
}

// newCrew starts n writers of ids on a daemon.
func (l *load) newCrew(to *daemon, n int, ids *ids) *crew {
	c := &crew{load: l, stop: make(chan struct{})}
	c.add(to, n, ids)
	return c
}

// add starts n more.
func (c *crew) add(to *daemon, n int, ids *ids) {
	for range n {
		c.wg.Go(func() {
			client := admin.NewClient(to.socket)
			defer client.Close()
			c.write(client, ids)
		})
	}
}

// write writes one transaction after the other, until it is told to stop, has
// no more ids, or one is not acknowledged.
func (c *crew) write(client *admin.Client, ids *ids) {
	buf := make([]byte, largeSlot)
	var latencies []time.Duration
	var err error
	for err == nil && !c.stopped() {
		id, ok := ids.take()
		if !ok {
			break
		}
		start := time.Now()
		if err = c.load.commit(client, id, buf, ids); err == nil && id < smallSlots {
			latencies = append(latencies, time.Since(start))
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.latencies = append(c.latencies, latencies...)
	if c.err == nil && !c.doomed.Load() {
		c.err = err
	}
}

func (c *crew) stopped() bool {
	select {
	case <-c.stop:
		return true
	default:
		return false
	}
}

// end lets each writer finish its transaction.
func (c *crew) end() error {
	close(c.stop)
	c.wg.Wait()
	return c.err
}

// failed is the first error so far.
func (c *crew) failed() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// commit writes a transaction and records what became of it.
func (l *load) commit(client *admin.Client, id int, buf []byte, ids *ids) error {
	off, _ := slotOf(id)
	lsn, err := client.Write(context.Background(), off, l.content(id, buf), writeTime)
	e := &l.record[id]
	switch {
	case err == nil:
		e.outcome, e.lsn = acknowledged, lsn
		ids.acked.Add(1)
	case admin.IsOutcomeUnknown(err):
		e.outcome = unknown
	default:
		e.outcome = refused
	}
	return err
}

// tally is how the record compares with what is there.
type tally struct {
	acked int // transactions that must be there:
	equal int // they are
	lost  int // nothing of them is there
	wrong int // something else is there
	// unreadable ones the node does not serve: it found damage.
	unreadable int

	whole, absent, partial int // transactions of unknown outcome
	stray                  int // slots that hold what was not written, or was gone before
}

// compare looks for each transaction in an image of the volume. What was
// unknown is then settled.
func (l *load) compare(image []byte, bad map[int64]bool) tally {
	var t tally
	buf, zero := make([]byte, largeSlot), make([]byte, largeSlot)
	for id := range l.record {
		off, size := slotOf(id)
		have := image[off : off+int64(size)]
		want := l.content(id, buf)
		isZero := bytes.Equal(have, zero[:size])
		isWhole := bytes.Equal(have[:len(want)], want) && bytes.Equal(have[len(want):], zero[:size-len(want)])
		damaged := false
		for b := off / blockSize; b*blockSize < off+int64(len(want)); b++ {
			damaged = damaged || bad[b]
		}
		e := &l.record[id]
		t.judge(e.outcome, damaged, isWhole, isZero)
		switch {
		case e.outcome == unknown && isWhole:
			e.outcome = survived
		case e.outcome == unknown && isZero:
			e.outcome = refused
		}
	}
	return t
}

func (t *tally) judge(o outcome, damaged, whole, zero bool) {
	count := func(ok bool, n *int) bool {
		if ok {
			*n++
		}
		return ok
	}
	switch o {
	case acknowledged:
		t.acked++
		_ = count(damaged, &t.unreadable) || count(whole, &t.equal) || count(zero, &t.lost) || count(true, &t.wrong)
	case unknown:
		_ = count(damaged, &t.unreadable) || count(whole, &t.whole) || count(zero, &t.absent) || count(true, &t.partial)
	case survived:
		_ = count(damaged, &t.unreadable) || count(whole, &t.whole) || count(true, &t.partial)
	default:
		_ = count(damaged, &t.unreadable) || count(!zero, &t.stray)
	}
}
