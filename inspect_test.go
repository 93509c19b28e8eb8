package nvmmirror

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// unchanged fails the test where f changes the file in any way.
func unchanged(t *testing.T, path string, f func()) {
	t.Helper()
	look := func() ([]byte, os.FileInfo) {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		i, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		return b, i
	}
	before, info := look()
	f()
	after, now := look()
	if !bytes.Equal(before, after) || !info.ModTime().Equal(now.ModTime()) || info.Mode() != now.Mode() {
		t.Errorf("%s was changed by an inspection", path)
	}
}

func TestInspect(t *testing.T) {
	c := makeCrashed(t)
	path := writeRegion(t, c.applied)
	if err := os.Chmod(path, 0o400); err != nil {
		t.Fatal(err)
	}
	unchanged(t, path, func() {
		i, err := Inspect(path)
		if err != nil {
			t.Fatal(err)
		}
		last := len(c.states) - 1
		r := i.Recovery
		if i.InUse || i.Clean || !i.Consistent || i.Blank || i.Role.String() != "primary" || !i.Title || i.Size != smallSize ||
			i.Length != i.Expected || !i.Metadata[0].Newest || !i.Metadata[1].Newest || len(i.History) != 1 {
			t.Errorf("%+v", i)
		}
		if r == nil || r.From != c.meta.Checkpoint.LSN || r.End != c.ends[last] || r.Apply != r.End || r.Acked != r.End || r.Ending != EndOfLog || r.Refused != "" {
			t.Errorf("%+v", r)
		}
		if _, err := json.Marshal(i); err != nil {
			t.Error(err)
		}
	})
}

// TestInspectForeseesRecovery compares what inspection says of a region with
// what recovery then does.
func TestInspectForeseesRecovery(t *testing.T) {
	c := makeCrashed(t)
	for name, image := range map[string][]byte{
		"clean": c.clean, "applied": c.applied, "pending": c.pending,
		"torn":    flipped(c.pending, c, len(c.states)-1),
		"damaged": flipped(c.applied, c, len(c.states)-5),
	} {
		s := inspected(t, image)
		v, err := openMemory("heap", newHeapMemory(bytes.Clone(image)), Options{Logger: nopLogger})
		if err != nil {
			t.Fatal(name, err)
		}
		o, r := s.ins.Recovery, v.recovery
		if o.From != r.From || o.End != r.End || o.Apply != r.Applied || o.Segments != r.Segments || o.Transactions != r.Transactions ||
			(o.Ending == EndDamaged) != (r.Damage != "") || s.ins.Clean != r.Clean {
			t.Errorf("%s: foreseen %+v, done %+v", name, o, r)
		}
	}
}

// flipped is an image with one bit changed in the segment of the n-th commit.
func flipped(image []byte, c *crashed, n int) []byte {
	b := bytes.Clone(image)
	lo, _ := c.ringSpan(n)
	b[lo+70] ^= 1
	return b
}

func TestInspectRefuses(t *testing.T) {
	dir := shm(t)
	for name, content := range map[string][]byte{"empty": nil, "text": []byte("not a region"), "short": make([]byte, metaArea), "zeros": make([]byte, 5<<20)} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		if i, err := Inspect(path); i != nil || !errors.Is(err, ErrNotRegion) || !bytes.Contains([]byte(err.Error()), []byte(path)) {
			t.Errorf("%s: %v, %v", name, i, err)
		}
		if _, err := Check(path); !errors.Is(err, ErrNotRegion) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := InspectJournal(path, JournalOptions{}, nil); !errors.Is(err, ErrNotRegion) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Inspect(filepath.Join(dir, "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	if _, err := Inspect(dir); err == nil {
		t.Error("a directory is no region")
	}
}

func TestInspectJournalOfClosedRegion(t *testing.T) {
	c := makeCrashed(t)
	last := len(c.states) - 1
	path := writeRegion(t, c.applied)
	unchanged(t, path, func() {
		next, pads := c.meta.Checkpoint.LSN, 0
		stop, err := InspectJournal(path, JournalOptions{Records: true, Data: 4}, func(s *SegmentInfo) error {
			if s.LSN != next || s.State != "ok" || len(s.Problems) > 0 || s.Offset != c.meta.Journal.Off+int64(s.LSN%smallJournal) {
				t.Errorf("at LSN %d: %+v", next, s)
			}
			if next = s.End; s.Kind == "padding" {
				pads++
			} else if len(s.Records) == 0 || len(s.Records[0].Data) > 8 {
				t.Errorf("records %+v", s.Records)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if pads != 1 || next != c.ends[last] || stop.End != next || stop.Damaged || stop.Ending != EndOfLog {
			t.Errorf("%d paddings, up to %d: %+v", pads, next, stop)
		}
	})
	path = writeRegion(t, flipped(c.applied, c, last-5))
	states := map[string]int{}
	stop, err := InspectJournal(path, JournalOptions{}, func(s *SegmentInfo) error { states[s.State]++; return nil })
	if err != nil {
		t.Fatal(err)
	}
	if !stop.Damaged || stop.Ending != EndDamaged || stop.Unreachable != 5 || states["unreachable"] != 5 || stop.End != c.ends[last-6] {
		t.Errorf("%+v, %v", stop, states)
	}
	if !strings.Contains(stop.Reason, fmt.Sprintf("below %d which was acknowledged", stop.Acked)) {
		t.Errorf("acknowledged up to %d, and %s", stop.Acked, stop.Reason)
	}
}

// TestInspectLive looks into a volume's journal, and at its metadata, while
// transactions go on, wrap the ring and move the checkpoint.
func TestInspectLive(t *testing.T) {
	path := filepath.Join(shm(t), "r")
	if err := Create(path, CreateOptions{Size: 1 << 20, JournalSize: MinJournal, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
	v, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	for g := range 3 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				tx := v.Begin()
				tx.Write(int64(g)*300_000, bytes.Repeat([]byte{byte(i)}, 1+i*997%50_000))
				if _, err := tx.Commit(context.Background()); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	looks, segments, began := 0, 0, v.journal.End()
	for deadline := time.Now().Add(20 * time.Second); looks < 50 || v.journal.End()-began < 5*MinJournal; looks++ {
		if time.Now().After(deadline) {
			t.Fatal("the ring does not wrap")
		}
		var next LSN
		stop, err := v.InspectJournal(ctx, JournalOptions{Records: true, Data: 16}, func(s *SegmentInfo) error {
			if s.LSN < next || s.State != "ok" || len(s.Problems) > 0 {
				t.Errorf("behind LSN %d: %+v", next, s)
			}
			next = s.End
			segments++
			return nil
		})
		if err != nil || stop.Ending != EndLive || stop.Damaged {
			t.Fatalf("%v, %+v", err, stop)
		}
		i, err := Inspect(path)
		if err != nil || !i.InUse || i.Recovery != nil || !i.Metadata[0].Valid || !i.Metadata[1].Valid {
			t.Fatalf("%v, %+v", err, i)
		}
	}
	if _, err := Check(path); !errors.Is(err, ErrInUse) {
		t.Errorf("check of a region in use: %v", err)
	}
	if _, err := InspectJournal(path, JournalOptions{}, nil); !errors.Is(err, ErrInUse) {
		t.Errorf("journal of a region in use: %v", err)
	}
	cancel()
	wg.Wait()
	end := v.journal.End()
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := v.InspectJournal(context.Background(), JournalOptions{}, func(*SegmentInfo) error { return nil }); err != nil && !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	t.Logf("%d looks, %d segments, %d laps", looks, segments, (end-began)/MinJournal)
}

// TestInspectLiveFindsDamage: a bit of the live ring flips.
func TestInspectLiveFindsDamage(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	v := openQuiet(t, mem)
	var ends []LSN
	for i := range 10 {
		end, err := (transaction{{int64(i) * 1000, []byte("live")}}).commit(v)
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, end)
	}
	mem.b[v.meta.Journal.Off+int64(ends[4])+80] ^= 1
	n := 0
	stop, err := v.InspectJournal(context.Background(), JournalOptions{}, func(*SegmentInfo) error { n++; return nil })
	if err != nil || !stop.Damaged || stop.Ending != EndDamaged || stop.End != ends[4] || n != 5 {
		t.Fatalf("%v, %d segments, %+v", err, n, stop)
	}
	var f *journal.FormatError
	if _, err := ringOf(mem.b, &v.meta).Segment(ends[4], new(journal.Header)); !errors.As(err, &f) {
		t.Fatal(err)
	}
}

// TestInspectPair: both nodes' journals are the same bytes at the same LSNs,
// also while the secondary receives.
func TestInspectPair(t *testing.T) {
	a, b := newPair(t, testConfig{quiet: true})
	if err := a.Promote(context.Background(), false); err != nil {
		t.Fatal(err)
	}
	a.inSync()
	look := func(n *testNode) map[LSN]string {
		t.Helper()
		segments := map[LSN]string{}
		stop, err := n.InspectJournal(context.Background(), JournalOptions{}, func(s *SegmentInfo) error {
			segments[s.LSN] = s.CRC
			return nil
		})
		if err != nil || stop.Damaged {
			t.Fatalf("%s: %v, %+v", n.name, err, stop)
		}
		return segments
	}
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			commit(t, a, int64(i%100)*1000, bytes.Repeat([]byte{byte(i)}, 1+i*31%9000))
		}
	})
	common, looks := 0, 0
	for deadline := time.Now().Add(20 * time.Second); common < 200 && time.Now().Before(deadline); looks++ {
		of := look(a)
		for lsn, crc := range look(b) {
			if mine, ok := of[lsn]; ok {
				if common++; mine != crc {
					t.Errorf("LSN %d: %s and %s", lsn, mine, crc)
				}
			}
		}
	}
	cancel()
	wg.Wait()
	t.Logf("%d looks, %d segments in common", looks, common)
	if common < 200 {
		t.Error("too few segments in common")
	}
}
