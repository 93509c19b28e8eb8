package chaos

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/internal/admin"
)

const (
	writers     = 6
	smallOnes   = 2 // of the writers: they make the peer answer often
	smallMax    = 4 << 10
	recordMax   = 1 << 20
	recordMin   = 64
	slotsPer    = 2 // each writer's, used in turn
	volumeSize  = writers * slotsPer * recordMax
	writeTime   = 60 * time.Second
	applyTime   = 20 * time.Second // for what was acknowledged to be applied at the peer
	readBackOne = 8                // in so many records is read back through the daemon
)

// load is writers that count up. Each acknowledged transaction is then looked
// for in both regions, past the daemons, before its slot is used again: so not
// only the last of them are verified. The primary is a, throughout.
type load struct {
	t       *testing.T
	p       *pair
	data    [2][]byte // of the two regions
	slots   [writers][slotsPer]record
	commits atomic.Int64
	bytes   atomic.Int64
	stop    context.CancelFunc
	wg      sync.WaitGroup
}

// record is what a slot holds: acknowledged, and verified once.
type record struct {
	off  int64
	data []byte
}

func startLoad(p *pair, seed uint64) *load {
	l := &load{t: p.t, p: p, data: [2][]byte{viewData(p.t, p.a.region), viewData(p.t, p.b.region)}}
	ctx, cancel := context.WithCancel(context.Background())
	l.stop = cancel
	for w := range writers {
		l.wg.Go(func() {
			if err := l.write(ctx, w, rand.New(rand.NewPCG(seed, uint64(w)))); err != nil {
				l.t.Errorf("writer %d: %v", w, err)
				cancel()
			}
		})
	}
	p.t.Cleanup(l.end) // before the daemons end, where the test fails
	return l
}

func (l *load) write(ctx context.Context, w int, rng *rand.Rand) error {
	c := admin.NewClient(l.p.a.socket)
	defer c.Close()
	longest := recordMax
	if w < smallOnes {
		longest = smallMax
	}
	var back []byte
	for n := 0; ctx.Err() == nil; n++ {
		r := &l.slots[w][n%slotsPer]
		r.off = int64(w*slotsPer+n%slotsPer) * recordMax
		r.data = random(rng, r.data, recordMin+rng.IntN(longest-recordMin))
		// The load's end does not end a wait: nothing is of unknown outcome.
		if _, err := c.Write(context.Background(), r.off, r.data, writeTime); err != nil {
			return fmt.Errorf("transaction %d: %w", n, err)
		}
		l.commits.Add(1)
		l.bytes.Add(int64(len(r.data)))
		if err := l.verify(r); err != nil {
			return fmt.Errorf("transaction %d was acknowledged: %w", n, err)
		}
		if n%readBackOne == 0 {
			back = append(back[:0], r.data...)
			clear(back)
			if err := l.readBack(c, r, back); err != nil {
				return fmt.Errorf("transaction %d was acknowledged: %w", n, err)
			}
		}
	}
	return nil
}

// readBack reads a record as clients do. While the pair is apart, the primary
// serves no reads.
func (l *load) readBack(c *admin.Client, r *record, p []byte) (err error) {
	for deadline := time.Now().Add(writeTime); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if err = c.Read(context.Background(), r.off, p); err != nil {
			continue
		}
		if !bytes.Equal(p, r.data) {
			return fmt.Errorf("other bytes were read at %d", r.off)
		}
		return nil
	}
	return err
}

// verify looks for a record in both regions. The secondary applies after it
// has acknowledged.
func (l *load) verify(r *record) error {
	for i, data := range l.data {
		deadline := time.Now().Add(applyTime)
		for !bytes.Equal(data[r.off:][:len(r.data)], r.data) {
			if time.Now().After(deadline) {
				return fmt.Errorf("region %d does not hold its %d bytes at %d", i, len(r.data), r.off)
			}
			time.Sleep(100 * time.Microsecond)
		}
	}
	return nil
}

// random fills p with n bytes.
func random(rng *rand.Rand, p []byte, n int) []byte {
	p = p[:0]
	for len(p) < n {
		p = binary.LittleEndian.AppendUint64(p, rng.Uint64())
	}
	return p[:n]
}

// more waits for so many further commits.
func (l *load) more(n int64) {
	l.t.Helper()
	want := l.commits.Load() + n
	poll(l.t, writeTime, fmt.Sprintf("%d more commits", n), func() (bool, string) {
		return l.commits.Load() >= want || l.t.Failed(), fmt.Sprintf("%d missing", want-l.commits.Load())
	})
}

// end stops the writers and verifies what was acknowledged last.
func (l *load) end() {
	l.stop()
	l.wg.Wait()
	for w := range l.slots {
		for i := range l.slots[w] {
			if r := &l.slots[w][i]; !l.t.Failed() && r.data != nil {
				if err := l.verify(r); err != nil {
					l.t.Errorf("writer %d, at the end: %v", w, err)
				}
			}
		}
	}
}
