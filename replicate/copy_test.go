package replicate

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror/journal"
)

// A session that ends before all was looked at that came before it leaves blocks that
// lack log from before it.
func TestPartsOfACopy(t *testing.T) {
	had := parts{{10, 256}, {20, 128}}
	for next, want := range map[int64]parts{
		0:  had,
		9:  {{9, 512}, {10, 256}, {20, 128}},
		10: {{10, 512}, {20, 128}},
		20: {{20, 512}},
		21: {{21, 512}},
	} {
		if got := had.after(next, 512); !slices.Equal(got, want) || !got.valid(21) || got.blocks() != max(next, 20) {
			t.Errorf("blocks up to %d: %+v, want %+v", next, got, want)
		}
	}
	have := parts{}
	for i := range int64(100) { // each ends earlier
		have = have.after(1000-i, 64)
		if !have.valid(1000) || have.blocks() != 1000 {
			t.Fatalf("%+v", have)
		}
	}
}

// However many sessions have ended before they had replaced all that had changed, each
// gets further than the one before: what the last one did is not forgotten.
func TestCopyGetsFurther(t *testing.T) {
	const blocks, each = 2000, 50
	var have parts
	log := journal.LSN(64)
	for next := int64(blocks); next >= each; next -= 100 { // all blocks change, again and again
		have, log = have.after(next, log), log+64
	}
	for sessions := 0; ; sessions++ {
		next, moved := int64(0), 0
		for ; next < blocks; next++ {
			since := journal.LSN(0)
			for _, h := range have {
				if next < h.End {
					since = h.LSN
					break
				}
			}
			if since == log {
				continue // not changed since
			}
			if moved++; moved > each {
				break
			}
		}
		if next == blocks {
			break
		}
		if have = have.after(next, log); sessions > blocks/each {
			t.Fatalf("after %d sessions of %d blocks, of %d: %+v", sessions, each, blocks, have)
		}
	}
}

// A peer's list of parts is not told in full.
func TestPeersPartsAreBounded(t *testing.T) {
	for _, body := range []string{
		`{"parts":[` + strings.Repeat(`{"end":-1},`, 20<<10) + `{}]}`, `{"parts":[{"end":-1}]}`, `{"parts":[{"end":5},{"end":4}]}`, `{"parts":[{"end":11}]}`,
		`{"parts":[{"end":10}],"lacks":[` + strings.Repeat("1,", maxLacks) + `1]}`,
	} {
		c := &copier{end: 10}
		if err := c.resume(&Pair{log: zap.NewNop()}, &follow{Full: true}, []byte(body)); err == nil || len(err.Error()) > 200 {
			t.Errorf("an error of %d bytes", len(fmt.Sprint(err)))
		}
	}
}

// TestWorth: few blocks that have not changed do not cut a message of blocks in two,
// else a copy of every other block takes ten times as long as one of all. A damaged
// one does: it cannot be read.
func TestWorth(t *testing.T) {
	for in, want := range map[string]int64{
		"c":                1,
		"ccc":              3,
		"c.c.c.c.":         7,
		"c.........c":      1,
		"c........c":       10,
		"cd.c":             1,
		"c.dc":             1,
		"c..............c": 1,
	} {
		look := make([]BlockInfo, len(in))
		for i := range in {
			look[i].Damaged = in[i] == 'd'
			if in[i] == 'c' {
				look[i].LSN = 1
			}
		}
		if got := worth(look, func(b BlockInfo) bool { return b.LSN > 0 }); got != want {
			t.Errorf("%s: %d, want %d", in, got, want)
		}
	}
}
