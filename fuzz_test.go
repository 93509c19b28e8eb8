package nvmmirror

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"
)

// FuzzOpen changes a killed region in any number of places, opens it and
// checks it. edits is a list of {place u8, offset u24, bytes u8, value}; seal
// makes checksums right afterwards, so that what lies behind them is reached.
//
// It must not panic nor take long, and what was not sealed must not be
// accepted where it is wrong.
func FuzzOpen(f *testing.F) {
	c := makeCrashed(f)
	m := &c.meta
	last := len(c.states) - 1
	ring := ringOf(c.applied, m)
	places := []int64{0, metaArea, m.Journal.Off + int64(ring.Position(m.Checkpoint.LSN)), m.Journal.Off + int64(ring.Position(c.ends[last-3])),
		m.Journal.Off + int64(ring.Position(c.ends[last])), m.Journal.Off, m.Table.Off, m.Data.Off}
	f.Add([]byte{}, false)
	f.Add([]byte{0, 0, 0, 100, 1, 7}, false)
	f.Add([]byte{0, 0, 0, 92, 4, 255}, true)
	f.Add([]byte{1, 0, 0, 160, 8, 9, 2, 0, 0, 40, 4, 1}, true)
	f.Add([]byte{3, 0, 0, 64, 8, 200}, false)
	f.Add([]byte{4, 0, 0, 0, 64, 1}, true)
	mem := newHeapMemory(slices.Clone(c.applied))
	f.Fuzz(func(t *testing.T, edits []byte, seal bool) {
		mem.keepUndo = true
		defer func() {
			mem.restore()
			mem.keepUndo = false
		}()
		for ; len(edits) >= 6; edits = edits[6:] {
			off := places[int(edits[0])%len(places)] + int64(binary.BigEndian.Uint32(append([]byte{0}, edits[1:4]...)))
			n := int64(edits[4])
			if off+n > int64(len(mem.b)) {
				continue
			}
			mem.put(off, bytes.Repeat(edits[5:6], int(n)))
		}
		if seal {
			for _, at := range []int64{0, metaArea} {
				mem.put(at, sealed(slices.Clone(mem.b[at:at+metaMax])))
			}
			for _, at := range places[2:5] {
				h := slices.Clone(mem.b[at : at+64])
				forgeHeader(h, func([]byte) {})
				mem.put(at, h)
			}
		}
		edited := len(mem.undo)
		checkImage(mem.b)
		if len(mem.undo) != edited {
			t.Fatal("check stores")
		}
		v, err := openMemory("heap", mem, Options{Logger: nopLogger})
		switch {
		case err != nil:
			if !typed(err) {
				t.Fatalf("%v (%T)", err, err)
			}
		case seal || v.damage.Load() != nil:
		default:
			data, bad := blockContent(v)
			for b := range m.Size / blockSize {
				if v.unverified.has(b) {
					bad[b] = true // the crash made its checksum unknown
				}
			}
			if c.prefixOf(data, bad) < 0 {
				t.Fatal("wrong content was accepted")
			}
		}
	})
}
