package nvmmirror

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

func drawHistory(t *rapid.T) (h journal.History) {
	e := journal.Entry{}
	for range rapid.OneOf(rapid.IntRange(0, 5), rapid.IntRange(journal.MaxHistory-2, journal.MaxHistory)).Draw(t, "epochs") {
		e.Epoch.Counter += rapid.Uint64Range(1, 3).Draw(t, "counter")
		e.Epoch.Node = rapid.Uint64().Draw(t, "node")
		e.PeerIn, e.Async = rapid.Bool().Draw(t, "in"), rapid.Bool().Draw(t, "async")
		h = append(h, e)
		e.Start += LSN(rapid.Uint64Range(1, 1000).Draw(t, "start")) * journal.Align
	}
	return h
}

func drawMetadata(t *rapid.T) *metadata {
	block := rapid.Int64Range(1, 1<<20)
	m := layout(block.Draw(t, "blocks")*blockSize, rapid.Int64Range(1, 64).Draw(t, "journal")*pmem.AreaAlign)
	m.Generation, m.Compat, m.Class = rapid.Uint64().Draw(t, "generation"), rapid.Uint64().Draw(t, "compat"), pmem.Class(rapid.IntRange(1, 4).Draw(t, "class"))
	m.Clean = rapid.Bool().Draw(t, "clean")
	m.RingBase = LSN(rapid.Uint64Range(0, 1<<40).Draw(t, "base")) * journal.Align
	m.Checkpoint = checkpoint{
		LSN:   m.RingBase + LSN(rapid.Uint64Range(0, 1<<40).Draw(t, "checkpoint"))*journal.Align,
		Epoch: journal.Epoch{Counter: rapid.Uint64().Draw(t, "counter"), Node: rapid.Uint64().Draw(t, "node")}, Chain: rapid.Uint32().Draw(t, "chain"),
	}
	if m.Counts = rapid.Bool().Draw(t, "counts"); m.Counts {
		m.Shutdowns = rapid.Uint64Range(0, 1<<40).Draw(t, "shutdowns")
	}
	st := &m.State
	copy(st.Lineage[:], rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "lineage"))
	st.Node, st.Peer = rapid.Uint64().Draw(t, "node"), rapid.Uint64().Draw(t, "peer")
	st.Role, st.Title, st.Alone = replicate.Role(rapid.IntRange(0, 1).Draw(t, "role")), rapid.Bool().Draw(t, "title"), rapid.Bool().Draw(t, "alone")
	st.Lease = time.Duration(rapid.Int64Range(0, 1<<31).Draw(t, "lease")) * time.Millisecond
	st.Acked = LSN(rapid.Uint64().Draw(t, "acked"))
	st.History = drawHistory(t)
	if st.Role == replicate.Secondary && rapid.Bool().Draw(t, "resync") {
		base := LSN(rapid.Uint64Range(0, 1<<40).Draw(t, "base")) * journal.Align
		st.Resync = &replicate.Resync{
			Fork: base + LSN(rapid.Uint64Range(0, 1<<40).Draw(t, "fork"))*journal.Align, Base: base, Chain: rapid.Uint32().Draw(t, "chain"),
			Epoch: journal.Epoch{Counter: rapid.Uint64().Draw(t, "counter"), Node: rapid.Uint64().Draw(t, "node")},
		}
	}
	return m
}

func TestMetadataRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawMetadata(t)
		b := m.encode(make([]byte, metaMax))
		got, err := decodeMetadata(append(b, make([]byte, rapid.IntRange(0, 100).Draw(t, "behind"))...))
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(m, got, cmp.AllowUnexported(metadata{}, extent{}, checkpoint{})); d != "" {
			t.Fatal(d)
		}
		for _, at := range []int{rapid.IntRange(0, len(b)-1).Draw(t, "flip"), 8, 12, len(b) - 1} {
			b[at] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
			if _, err := decodeMetadata(b); err == nil {
				t.Fatalf("a flip in byte %d is not noticed", at)
			}
			b = m.encode(make([]byte, metaMax))
		}
	})
}

// TestMetadataNewest: whatever becomes of one copy, what is read is the state
// of the last change that was complete, or of the one under way.
func TestMetadataNewest(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	image := newHeapMemory(slices.Clone(mem.b))
	c, err := readMetadata(mem)
	if err != nil {
		t.Fatal(err)
	}
	m := *c.meta
	for i := range 20 {
		before := m
		m.State.Acked += 640
		m.State.History = m.State.History.Append(journal.Entry{Epoch: journal.Epoch{Counter: uint64(i + 1)}, Start: LSN(i) * 64})
		mem.log, mem.keepLog = nil, true
		if err := writeMetadata(mem, &m); err != nil {
			t.Fatal(err)
		}
		if len(mem.log) != 2 {
			t.Fatalf("%d stores", len(mem.log))
		}
		for n, s := range mem.log {
			old := slices.Clone(image.b[s.off:][:len(s.data)])
			for cut := 0; cut <= len(s.data); cut++ { // a crash in the middle of the store
				copy(image.b[s.off:], s.data[:cut])
				copy(image.b[s.off+int64(cut):], old[cut:])
				got, err := readMetadata(image)
				if err != nil {
					t.Fatal(err)
				}
				if g := got.meta.Generation; g != before.Generation && g != m.Generation || n == 1 && g != m.Generation {
					t.Fatalf("generation %d of %d after store %d, byte %d", g, m.Generation, n, cut)
				}
			}
		}
	}
}

// TestMetadataErrors: magic, version, checksum and sense are told apart.
func TestMetadataErrors(t *testing.T) {
	m := layout(1<<20, MinJournal)
	le := binary.LittleEndian
	var newer *NewerError
	for name, row := range map[string]struct {
		do func(b []byte) []byte
		ok func(error) bool
	}{
		"magic":           {func(b []byte) []byte { b[0]++; return b }, func(err error) bool { return errors.Is(err, errNoMagic) }},
		"flip":            {func(b []byte) []byte { b[20]++; return b }, func(err error) bool { return errors.Is(err, errMetaCRC) }},
		"flip in version": {func(b []byte) []byte { b[8]++; return b }, func(err error) bool { return errors.Is(err, errMetaCRC) }},
		"short":           {func(b []byte) []byte { return b[:200] }, func(err error) bool { return errors.Is(err, errMetaNone) }},
		"length 0":        {func(b []byte) []byte { le.PutUint32(b[12:], 0); return b }, func(err error) bool { return errors.Is(err, errMetaShort) }},
		"length too long": {func(b []byte) []byte { le.PutUint32(b[12:], 1<<31); return b }, func(err error) bool { return errors.Is(err, errMetaShort) }},
		"version":         {func(b []byte) []byte { le.PutUint32(b[8:], 2); return sealed(b) }, func(err error) bool { return errors.As(err, &newer) }},
		"incompat":        {func(b []byte) []byte { b[33] = 1; return sealed(b) }, func(err error) bool { return errors.As(err, &newer) }},
		"ro compat":       {func(b []byte) []byte { b[40] = 1; return sealed(b) }, func(err error) bool { return errors.As(err, &newer) }},
		"unknown flag":    {func(b []byte) []byte { b[85] = 1; return sealed(b) }, func(err error) bool { return err != nil && !errors.As(err, &newer) }},
		"block size":      {func(b []byte) []byte { b[89] = 1; return sealed(b) }, func(err error) bool { return err != nil }},
		"size 0":          {func(b []byte) []byte { le.PutUint64(b[144:], 0); return sealed(b) }, func(err error) bool { return err != nil }},
		"size too large":  {func(b []byte) []byte { le.PutUint64(b[144:], 1<<40); return sealed(b) }, func(err error) bool { return err != nil }},
		"negative size":   {func(b []byte) []byte { le.PutUint64(b[144:], 1<<63); return sealed(b) }, func(err error) bool { return err != nil }},
		"negative area":   {func(b []byte) []byte { le.PutUint64(b[104:], 1<<63); return sealed(b) }, func(err error) bool { return err != nil }},
		"unaligned area":  {func(b []byte) []byte { b[104]++; return sealed(b) }, func(err error) bool { return err != nil }},
	} {
		b := row.do(m.encode(make([]byte, metaMax)))
		if _, err := decodeMetadata(b); !row.ok(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Metadata with a good checksum that no program of this kind has written is refused:
// commits would panic, wait for ever, or not outlive a crash.
func TestMetadataThatDoesNotFit(t *testing.T) {
	for name, f := range map[string]func(m *metadata){
		"":                      func(*metadata) {},
		"LSN out of range":      func(m *metadata) { m.RingBase = ^LSN(0) - 63; m.Checkpoint.LSN = m.RingBase },
		"copy onto a primary":   func(m *metadata) { m.State.Role, m.State.Resync = replicate.Primary, &replicate.Resync{Fork: 64} },
		"copy to an odd LSN":    func(m *metadata) { m.State.Resync = &replicate.Resync{Fork: 65} },
		"copy into an odd ring": func(m *metadata) { m.State.Resync = &replicate.Resync{Fork: 64, Base: 1} },
		"copy below its ring":   func(m *metadata) { m.State.Resync = &replicate.Resync{Fork: 64, Base: 128} },
		"copy out of range":     func(m *metadata) { m.State.Resync = &replicate.Resync{Fork: ^LSN(0) - 63} },
		"counter out of range":  func(m *metadata) { m.State.History = journal.History{{Epoch: journal.Epoch{Counter: 1 << 63}}} },
		"epochs in no order": func(m *metadata) {
			m.State.History = journal.History{{Epoch: journal.Epoch{Counter: 2}}, {Epoch: journal.Epoch{Counter: 1}}}
		},
		"checkpoint before base": func(m *metadata) { m.RingBase = 64 },
	} {
		m := layout(1<<20, MinJournal)
		f(m)
		if _, err := decodeMetadata(m.encode(make([]byte, metaMax))); (err == nil) != (name == "") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Two whole copies of different regions: neither is written over the other.
func TestMetadataOfTwoRegions(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	for name, f := range map[string]func(m *metadata){
		"node": func(m *metadata) { m.State.Node++ },
		"size": func(m *metadata) { m.Size -= blockSize },
	} {
		image := newHeapMemory(slices.Clone(mem.b))
		c, err := readMetadata(image)
		if err != nil {
			t.Fatal(err)
		}
		m := *c.meta
		m.Generation++
		f(&m)
		m.encode(image.b[metaArea:][:metaMax])
		if _, err := tryOpenQuiet(image); !isCorrupt(err) || !strings.Contains(err.Error(), "different regions") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// sealed makes the checksum of a copy right.
func sealed(b []byte) []byte {
	n := int64(binary.LittleEndian.Uint32(b[12:]))
	if n < metaFixed+4 || n > int64(len(b)) {
		return b
	}
	binary.LittleEndian.PutUint32(b[n-4:], crc32c.Sum(b[:n-4]))
	return b
}

func FuzzDecodeMetadata(f *testing.F) {
	m := layout(1<<20, MinJournal)
	f.Add(m.encode(make([]byte, metaMax)), false)
	m.State.History = journal.History{{Epoch: journal.Epoch{Counter: 1, Node: 2}, PeerIn: true}, {Epoch: journal.Epoch{Counter: 2, Node: 3}, Start: 64}}
	m.State.Resync = &replicate.Resync{Fork: 64}
	f.Add(m.encode(make([]byte, metaMax)), true)
	f.Fuzz(func(t *testing.T, b []byte, seal bool) {
		if seal && len(b) > metaFixed+4 {
			b = sealed(bytes.Clone(b))
		}
		m, err := decodeMetadata(b)
		if err != nil {
			return
		}
		again, err := decodeMetadata(m.encode(make([]byte, metaMax)))
		if m.Compat != 0 {
			return // what it means is not known, and it may speak of reserved bytes
		}
		if d := cmp.Diff(m, again, cmp.AllowUnexported(metadata{}, extent{}, checkpoint{})); err != nil || d != "" {
			t.Fatal(err, d)
		}
	})
}

// TestNewerMetadataIsLonger: what a newer program wrote is not taken for damage,
// however long it is; and a count of an earlier build is one.
func TestNewerMetadataIsLonger(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	c, err := readMetadata(mem)
	if err != nil {
		t.Fatal(err)
	}
	seal := func(b []byte) {
		binary.LittleEndian.PutUint32(b[len(b)-4:], crc32c.Sum(b[:len(b)-4]))
	}
	old := c.meta.encode(make([]byte, metaMax))
	binary.LittleEndian.PutUint64(old[240:], 5)
	seal(old)
	if m, err := decodeMetadata(old); err != nil || !m.Counts || m.Shutdowns != 5 {
		t.Errorf("a count of an earlier build: %+v, %v", m, err)
	}
	for i := range 2 {
		b := mem.b[i*metaArea:][:metaMax+4096]
		binary.LittleEndian.PutUint32(b[8:], metaVersion+1)
		binary.LittleEndian.PutUint32(b[12:], uint32(len(b)))
		seal(b)
	}
	var newer *NewerError
	if _, err := readMetadata(mem); !errors.As(err, &newer) {
		t.Errorf("longer copies of a newer version: %v", err)
	}
	if _, err := Open(writeRegion(t, mem.b), Options{Logger: nopLogger}); !errors.As(err, &newer) {
		t.Errorf("opened: %v", err)
	}
}

// A lease is never remembered as a shorter one.
func TestLeaseIsRoundedUp(t *testing.T) {
	m := layout(blockSize, MinJournal)
	m.Class, m.State.Node, m.State.Lease = pmem.Emulated, 1, 25*time.Millisecond+time.Nanosecond
	got, err := decodeMetadata(m.encode(make([]byte, metaMax)))
	if err != nil || got.State.Lease != 26*time.Millisecond {
		t.Errorf("%v: %v", got.State.Lease, err)
	}
}
