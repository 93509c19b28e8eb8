package nvmmirror

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// A primary that goes on alone commits faster than a slow wire takes the log
// to the peer that returned. The peer still gets in sync, within a bound: the
// writers pause for what it has not got.
func TestJoinWhileWritersAreFasterThanTheWire(t *testing.T) {
	t.Parallel()
	a, b := newPair(t, testConfig{opt: Options{OnPeerLoss: Alone}, quiet: true, timeout: time.Second})
	a.promote(false)
	a.inSync()
	b.inSync()
	b.close()
	a.until("alone", func(s Status) bool { return s.Peer == "lost" && !a.pair.Required() })
	a.wire.setChop(16<<10, 2*time.Millisecond) // 8 MB/s at most
	l := startLoad(t, 8, func() *Volume { return a.Volume })
	l.more(100)
	b.open()
	b.inSync()
	a.inSync()
	a.wire.setChop(0, 0)
	l.more(100)
	l.end()
	l.check(a)
	identical(t, a, b)
}

// fencedMemory notes how much is flushed, at most, for one fence to wait for.
type fencedMemory struct {
	*heapMemory
	flushed, most int64
}

func (m *fencedMemory) Flush(off, n int64) { m.flushed += n }
func (m *fencedMemory) Fence() error {
	m.most = max(m.most, m.flushed)
	m.flushed = 0
	return nil
}

// The source hears nothing while the target makes durable what was copied: that
// is done by steps, however large the volume.
func TestCopyBecomesDurableByStep(t *testing.T) {
	const size = 3*copyStep + 5*blockSize
	mem := &fencedMemory{heapMemory: newImage(t, size, smallJournal)}
	v := openQuiet(t, mem)
	n := (*node)(v)
	r := replicate.Resync{Fork: 1 << 20, Epoch: journal.Epoch{Counter: v.meta.State.History.Last().Epoch.Counter + 9, Node: 7}}
	err := n.StartCopy(r, false, func(st *replicate.State) {
		st.History = st.History.Append(journal.Entry{Epoch: r.Epoch, Start: r.Fork, PeerIn: true})
		st.Role, st.Title = replicate.Secondary, false
	})
	if err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte{7}, 16*blockSize)
	info := slices.Repeat([]replicate.BlockInfo{{LSN: r.Fork - 64, CRC: crcOf(data[:blockSize])}}, 16)
	for b := int64(0); b < size/blockSize; b += 16 {
		k := min(16, size/blockSize-b)
		if err := n.CopyBlocks(b, data[:k*blockSize], info[:k]); err != nil {
			t.Fatal(err)
		}
	}
	if err := n.FinishCopy(); err != nil {
		t.Fatal(err)
	}
	if mem.most > copyStep+copyStep/8 || mem.most < copyStep {
		t.Fatalf("a fence waits for %d MiB", mem.most>>20)
	}
	if got, bad := blockContent(v); len(bad) > 0 || !bytes.Equal(got, bytes.Repeat([]byte{7}, size)) {
		t.Fatalf("%d damaged blocks, or another content", len(bad))
	}
}
