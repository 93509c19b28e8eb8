package nvmmirror

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

var errCrashed = errors.New("crashed by the test")

// crash ends the node as kill -9 would: what its memory shows at one instant
// is what the next open finds. Nothing leaves the node from before that
// instant on, neither to the peer nor to its callers.
func (n *testNode) crash() {
	n.t.Helper()
	v := n.Volume
	if n.wire == nil {
		n.t.Fatal("only a node on a wire can crash: else its peer would hear of its end")
	}
	n.wire.dead.Store(true)
	v.committer.Acquire(context.Background())
	v.applyMu.Lock()
	v.metaMu.Lock()
	image := bytes.Clone(v.mem.Bytes())
	v.metaMu.Unlock()
	v.applyMu.Unlock()
	v.committer.Close(errCrashed, errCrashed)
	v.committer.Release()
	v.Close() // into memory that nobody will look at
	n.Volume = nil
	if err := os.WriteFile(n.path+".crash", image, 0o600); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Rename(n.path+".crash", n.path); err != nil {
		n.t.Fatal(err)
	}
}

// change edits a closed region's file.
func (n *testNode) change(f func(region []byte)) {
	n.t.Helper()
	b, err := os.ReadFile(n.path)
	if err != nil {
		n.t.Fatal(err)
	}
	f(b)
	if err := os.WriteFile(n.path, b, 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// editState edits the metadata of a closed region.
func (n *testNode) editState(f func(m *metadata)) {
	n.t.Helper()
	n.change(func(region []byte) {
		m := metadataOf(n.t, region)
		scan, err := survey(region, m, nil)
		if err != nil {
			n.t.Fatal(err)
		}
		n.endOnDisk = scan.End
		f(m)
		m.Generation++
		b := m.encode(make([]byte, metaMax))
		copy(region, b)
		copy(region[metaArea:], b)
	})
}

// replace puts a new, blank region in a node's place.
func replace(t testing.TB, n *testNode) {
	t.Helper()
	if n.Volume != nil {
		n.close()
	}
	b, err := os.ReadFile(n.path)
	if err != nil {
		t.Fatal(err)
	}
	m := metadataOf(t, b)
	if err := os.Remove(n.path); err != nil {
		t.Fatal(err)
	}
	if err := Create(n.path, CreateOptions{Size: m.Size, JournalSize: m.Journal.Len, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
}

// metadataOf is the metadata of a closed region's file.
func metadataOf(t testing.TB, region []byte) *metadata {
	t.Helper()
	c, err := readCopies(metadataBytes(region))
	if err != nil {
		t.Fatal(err)
	}
	return c.meta
}

func (n *testNode) promote(force bool) {
	n.t.Helper()
	if err := n.Promote(context.Background(), force); err != nil {
		n.t.Fatalf("%s: promote: %v", n.name, err)
	}
}

func (n *testNode) demote() {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), slow(20*time.Second))
	defer cancel()
	if err := n.Demote(ctx); err != nil {
		n.t.Fatalf("%s: demote: %v", n.name, err)
	}
}

func (n *testNode) peerIs(phase replicate.Phase) Status {
	n.t.Helper()
	return n.until("peer "+string(phase), func(s Status) bool { return s.Peer == phase })
}

func (n *testNode) roleIs(role string) {
	n.t.Helper()
	n.until(role, func(s Status) bool { return s.Role == role })
}

// refused checks that err refuses for fear of losing data.
func refused(t testing.TB, what string, err error) {
	t.Helper()
	var r *RefusedError
	if !errors.As(err, &r) {
		t.Fatalf("%s: %v, want a refusal", what, err)
	}
}

// quiesce waits until both nodes hold and show the same log.
func quiesce(t testing.TB, primary, secondary *testNode) {
	t.Helper()
	primary.inSync()
	secondary.inSync()
	end := primary.Status().Committed
	primary.until("applied", func(s Status) bool { return s.Applied >= end && s.Acked >= end })
	secondary.until("applied", func(s Status) bool { return s.Applied >= end })
	if p, s := primary.Status().Committed, secondary.Status().Committed; p != s {
		t.Fatalf("logs end at %d and %d", p, s)
	}
}

// sameMarks gives both nodes time to compare the blocks that neither has
// verified since a crash: each asks the other once a second.
func sameMarks(a, b *Volume) {
	same := func() bool {
		a.applyMu.RLock()
		defer a.applyMu.RUnlock()
		b.applyMu.RLock()
		defer b.applyMu.RUnlock()
		return slices.Equal(a.unverified.blockSet, b.unverified.blockSet)
	}
	for deadline := time.Now().Add(slow(10 * time.Second)); !same() && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
}

// identical writes a little, lets the pair come to rest, and compares
// everything that the two nodes must have in common: the rings over their
// common live range, the block tables, the data. One of them holds the title.
func identical(t testing.TB, primary, secondary *testNode) {
	t.Helper()
	primary.inSync()
	secondary.inSync()
	from := max(primary.Checkpoint(), secondary.Checkpoint())
	rng := rand.New(rand.NewPCG(11, 12))
	for range 20 {
		// Same bytes: content is not changed.
		off := rng.Int64N(primary.Size()/blockSize) * blockSize
		p := make([]byte, 1+rng.IntN(3*blockSize/2))
		if off+int64(len(p)) > primary.Size() {
			continue
		}
		primary.read(t, p, off)
		commit(t, primary, off, p)
	}
	quiesce(t, primary, secondary)
	if x, y := primary.Status().Title, secondary.Status().Title; x == y {
		t.Errorf("the title: %v here, %v at the peer", x, y)
	}
	a, b := primary.Volume, secondary.Volume
	sameMarks(a, b)
	a.applyMu.RLock()
	defer a.applyMu.RUnlock()
	b.applyMu.RLock()
	defer b.applyMu.RUnlock()
	ra, rb := a.journal.Ring(), b.journal.Ring()
	end := a.journal.End()
	if end-from > LSN(ra.Size()) {
		t.Fatalf("compared range %d to %d is longer than the ring", from, end)
	}
	for at := from; at < end; at += journal.Align {
		if !bytes.Equal(ra.Raw(at, journal.Align), rb.Raw(at, journal.Align)) {
			t.Errorf("rings differ at LSN %d of [%d, %d)", at, from, end)
			break
		}
	}
	differ := 0
	for block := range a.size / blockSize {
		ea, oka := a.table.get(block)
		eb, okb := b.table.get(block)
		if ea != eb || oka != okb {
			t.Errorf("block %d: table entries %+v (%v) and %+v (%v)", block, ea, oka, eb, okb)
			differ++
		}
		if !bytes.Equal(a.block(block), b.block(block)) {
			t.Errorf("block %d: data differs", block)
			differ++
		}
		if differ > 5 {
			t.Fatal("and more")
		}
	}
}

// A load is writers that each count up in a place of their own, two blocks
// apart at both ends of a transaction, and remember what was acknowledged.
type load struct {
	t       testing.TB
	slots   []slot
	stop    chan struct{}
	once    sync.Once
	wg      sync.WaitGroup
	commits atomic.Int64
}

type slot struct {
	acked, tried uint64 // the writer's until wait
}

// A record of a slot: its count, repeated over a length that depends on it.
func slotRecord(count uint64) []byte {
	n := 64 + int(count*2654435761%5000)
	return bytes.Repeat([]byte(fmt.Sprintf("%015d ", count)), n/16)
}

const slotSize = 4 * blockSize

// startLoad starts so many writers. They write to whoever target returns, and
// go on after errors.
func startLoad(t testing.TB, writers int, target func() *Volume) *load {
	l := &load{t: t, slots: make([]slot, writers), stop: make(chan struct{})}
	for g := range writers {
		l.wg.Go(func() { l.write(g, target) })
	}
	t.Cleanup(l.end) // before the nodes are closed, where a test fails
	return l
}

func (l *load) write(g int, target func() *Volume) {
	s := &l.slots[g]
	for {
		select {
		case <-l.stop:
			return
		default:
		}
		v := target()
		if v == nil {
			time.Sleep(time.Millisecond)
			continue
		}
		s.tried++
		rec := slotRecord(s.tried)
		tx := v.Begin()
		tx.Write(int64(2*g)*slotSize, rec)
		tx.Write(int64(2*g+1)*slotSize, rec)
		ctx, cancel := context.WithTimeout(context.Background(), slow(3*time.Second))
		_, err := tx.Commit(ctx)
		cancel()
		if err == nil {
			s.acked = s.tried
			l.commits.Add(1)
		} else {
			time.Sleep(time.Millisecond)
		}
	}
}

// more waits for so many further commits, for as long as there are any.
func (l *load) more(n int64) {
	l.t.Helper()
	at := l.commits.Load()
	want, since := at+n, time.Now()
	for now := at; now < want; now = l.commits.Load() {
		if now > at {
			at, since = now, time.Now()
		}
		if time.Since(since) > slow(20*time.Second) {
			l.t.Fatalf("writers are stuck %d commits short of %d", want-now, n)
		}
		time.Sleep(time.Millisecond)
	}
}

func (l *load) end() {
	l.once.Do(func() { close(l.stop) })
	l.wg.Wait()
}

// slotAt reads the count in a slot, and checks that both halves of the
// transaction are there.
func slotAt(n interface {
	ReadAt([]byte, int64) (int, error)
}, g int) (uint64, error) {
	p := make([]byte, 2*slotSize)
	if _, err := n.ReadAt(p, int64(2*g)*slotSize); err != nil {
		return 0, err
	}
	var count uint64
	if p[0] != 0 {
		if _, err := fmt.Sscanf(string(p[:15]), "%d", &count); err != nil {
			return 0, fmt.Errorf("slot %d holds %q", g, p[:16])
		}
		rec := slotRecord(count)
		if !bytes.Equal(p[:len(rec)], rec) || !bytes.Equal(p[slotSize:][:len(rec)], rec) {
			return 0, fmt.Errorf("slot %d holds a part of transaction %d", g, count)
		}
	}
	return count, nil
}

// check checks that all that was acknowledged is there, and nothing that was
// never written.
func (l *load) check(n *testNode) {
	l.t.Helper()
	for g := range l.slots {
		count, err := slotAt(n, g)
		for deadline := time.Now().Add(slow(5 * time.Second)); errors.Is(err, ErrNoLease) && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond)
			count, err = slotAt(n, g)
		}
		if err != nil {
			l.t.Fatalf("%s: %v", n.name, err)
		}
		if s := &l.slots[g]; count < s.acked || count > s.tried {
			l.t.Errorf("%s: slot %d holds %d, acknowledged %d, tried %d", n.name, g, count, s.acked, s.tried)
		}
	}
}

// fill writes n random records.
func fill(t testing.TB, n *testNode, seed uint64, count, size int) {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 1))
	for range count {
		p := make([]byte, 1+rng.IntN(size))
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		commit(t, n, rng.Int64N(n.Size()-int64(len(p))), p)
	}
}

// putEntry encodes a block table entry.
func putEntry(b []byte, e entry, block int64) {
	binary.LittleEndian.PutUint64(b, uint64(e.lsn))
	binary.LittleEndian.PutUint32(b[8:], e.crc)
	binary.LittleEndian.PutUint32(b[12:], e.check(block))
}
