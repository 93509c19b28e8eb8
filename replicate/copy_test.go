package replicate

import (
	"slices"
	"testing"
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
