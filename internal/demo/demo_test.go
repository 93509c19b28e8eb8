package demo

import (
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nvmmirror/nvmmirror/journal"
)

// Each thing that can be wrong with a volume is told apart.
func TestCompare(t *testing.T) {
	const small, large = 7, smallSlots + 3
	written := func(l *load, image []byte, id int, o outcome) {
		off, size := slotOf(id)
		copy(image[off:], l.content(id, make([]byte, size)))
		l.record[id].outcome = o
	}
	at := func(id int) int64 { off, _ := slotOf(id); return off }
	for name, c := range map[string]struct {
		spoil func(l *load, image []byte, bad map[int64]bool)
		want  tally
	}{
		"sound":         {func(*load, []byte, map[int64]bool) {}, tally{acked: 3, equal: 3, whole: 1, absent: 1}},
		"one byte":      {func(_ *load, p []byte, _ map[int64]bool) { p[at(large)+largeSlot-1] ^= 1 }, tally{acked: 3, equal: 2, wrong: 1, whole: 1, absent: 1}},
		"lost":          {func(_ *load, p []byte, _ map[int64]bool) { clear(p[at(large):][:largeSlot]) }, tally{acked: 3, equal: 2, lost: 1, whole: 1, absent: 1}},
		"another's":     {func(l *load, p []byte, _ map[int64]bool) { l.content(small+1, p[at(small):][:largeSlot]) }, tally{acked: 3, equal: 2, wrong: 1, whole: 1, absent: 1}},
		"in part":       {func(_ *load, p []byte, _ map[int64]bool) { p[at(50)] ^= 1 }, tally{acked: 3, equal: 3, partial: 1, absent: 1}},
		"never written": {func(_ *load, p []byte, _ map[int64]bool) { p[at(60)+smallSlot-1] = 1 }, tally{acked: 3, equal: 3, whole: 1, absent: 1, stray: 1}},
		"not served":    {func(_ *load, p []byte, bad map[int64]bool) { bad[at(large)/blockSize+2] = true }, tally{acked: 3, equal: 2, unreadable: 1, whole: 1, absent: 1}},
	} {
		t.Run(name, func(t *testing.T) {
			l, image, bad := newLoad(1), make([]byte, volumeSize), map[int64]bool{}
			written(l, image, small, acknowledged)
			written(l, image, large, acknowledged)
			written(l, image, smallSlots-1, acknowledged)
			written(l, image, 50, unknown)
			l.record[51].outcome = unknown // absent
			c.spoil(l, image, bad)
			got := l.compare(image, bad)
			if got != c.want {
				t.Errorf("%+v, not %+v", got, c.want)
			}
			if (got.verdict() == nil) != (name == "sound") {
				t.Errorf("verdict %v", got.verdict())
			}
		})
	}
}

// What was unknown and is found, or not, must stay so.
func TestCompareSettles(t *testing.T) {
	l, image := newLoad(1), make([]byte, volumeSize)
	l.record[0].outcome = acknowledged
	l.content(0, image)
	l.record[8].outcome, l.record[9].outcome = unknown, unknown
	off, size := slotOf(8)
	copy(image[off:], l.content(8, make([]byte, size)))
	if got := l.compare(image, nil); got.whole != 1 || got.absent != 1 || got.verdict() != nil {
		t.Fatalf("%+v", got)
	}
	clear(image[off:][:size])
	if got := l.compare(image, nil); got.verdict() == nil {
		t.Errorf("it was there, and nobody misses it: %+v", got)
	}
	copy(image[off:], l.content(8, make([]byte, size)))
	off, size = slotOf(9)
	copy(image[off:], l.content(9, make([]byte, size)))
	if got := l.compare(image, nil); got.verdict() == nil {
		t.Errorf("it was gone, and may be there again: %+v", got)
	}
}

func TestContentIsDistinct(t *testing.T) {
	l := newLoad(42)
	seen := map[uint64]int{}
	for id := range slots {
		_, size := slotOf(id)
		p := l.content(id, make([]byte, largeSlot))
		if len(p) == 0 || len(p) > size {
			t.Fatalf("%d bytes in a slot of %d", len(p), size)
		}
		first := binary.LittleEndian.Uint64(p)
		if other, ok := seen[first]; ok || first == 0 {
			t.Fatalf("transactions %d and %d begin alike", id, other)
		}
		seen[first] = id
	}
}

func TestForkOf(t *testing.T) {
	entry := func(counter, node uint64, start journal.LSN) journal.Entry {
		return journal.Entry{Epoch: journal.Epoch{Counter: counter, Node: node}, Start: start}
	}
	dead := journal.History{entry(1, 1, 0), entry(2, 1, 64)}
	if at, err := forkOf(dead, append(slices.Clone(dead), entry(3, 2, 640), entry(4, 2, 6400))); err != nil || at != 640 {
		t.Errorf("%v, %v", at, err)
	}
	for _, alive := range []journal.History{nil, dead[:1], dead, {entry(1, 1, 0), entry(2, 2, 64), entry(3, 2, 128)}} {
		if at, err := forkOf(dead, alive); err == nil {
			t.Errorf("%v goes on behind %v at %v", alive, dead, at)
		}
	}
}

func TestLookAt(t *testing.T) {
	dir := t.TempDir()
	if p, err := lookAt(dir); err != nil || p.base != dir {
		t.Errorf("%+v, %v", p, err)
	}
	long := filepath.Join(dir, strings.Repeat("x", maxBase))
	if err := os.Mkdir(long, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, bad := range []string{filepath.Join(dir, "none"), long} {
		if p, err := lookAt(bad); err == nil {
			t.Errorf("%s: %+v", bad, p)
		}
	}
}
