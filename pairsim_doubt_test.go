package nvmmirror

import (
	"bytes"
	"testing"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
)

// change commits a change of block 7 at a, and waits until the nodes' data hold it.
func (d *simScript) change(nodes []*simNode, lo int64, p []byte) {
	tx := d.model.tx(d.rng, false)
	tx.off, tx.data = tx.off[:1], tx.data[:1]
	tx.write(7*blockSize+lo, p)
	done := false
	d.a.client(func(v *Volume) {
		x := v.Begin()
		for k := range tx.off {
			x.Write(tx.off[k], tx.data[k])
		}
		x.Commit(d.t.Context())
	}, func(bool) { done = true })
	d.until("applied", func() bool {
		for _, n := range nodes {
			if n.v.Applied() != d.a.v.journal.End() {
				return false
			}
		}
		return done
	})
}

// takenAnew makes block 7 one whose checksum was taken anew after a crash.
func takenAnew(v *Volume) {
	v.applyMu.Lock()
	defer v.applyMu.Unlock()
	e, _ := v.table.get(7)
	v.table.set(7, entry{lsn: e.lsn, crc: crc32c.Sum(v.block(7)), unverified: true})
	v.unverified.add(7)
}

// settled: no block is to be compared any more, and none is damaged, though a flip was
// overwritten, and carried into a checksum: both nodes hold the same bytes.
func (d *simScript) settled() {
	d.until("settled", func() bool {
		for _, n := range d.nodes {
			if n.v.bad.has(7) || n.v.unverified.has(7) {
				return false
			}
		}
		return true
	})
	if !bytes.Equal(d.a.v.block(7), d.b.v.block(7)) {
		d.t.Fatalf("seed %d: the nodes differ", d.seed)
	}
}

// A flip at b, also where it was overwritten before it was found, and b's checksum
// carries it, says nothing against a's block, which a crash left unverified.
func TestUnverifiedBesideAFlip(t *testing.T) {
	direct(t, 8, Options{}, func(d *simScript) {
		d.begin()
		d.change(d.nodes[:], 100, []byte("first"))
		d.b.flipped[7] = true
		d.b.v.block(7)[2000] ^= 1
		if d.seed%2 == 0 {
			d.change(d.nodes[:], 1990, make([]byte, 20))
		}
		if d.b.v.bad.has(7) {
			d.t.Fatal("noticed")
		}
		takenAnew(d.a.v)
		d.settled()
	})
}

// The same at a, where the flip was known, and power failed after that; b's block is
// unverified too.
func TestUnverifiedBesideAKnownFlip(t *testing.T) {
	direct(t, 30, Options{OnPeerLoss: Alone}, func(d *simScript) {
		d.begin()
		d.change(d.nodes[:], 100, []byte("first"))
		d.kill(d.b)
		d.until("alone", func() bool { return d.a.alone() && d.a.serves() })
		if err := d.a.v.checkpoint(false); err != nil {
			d.t.Fatal(err)
		}
		d.a.flipped[7] = true
		d.a.v.block(7)[2000] ^= 1
		d.change(d.nodes[:1], 200, []byte("finds it"))
		if !d.a.v.bad.has(7) {
			d.t.Fatal("not found")
		}
		d.change(d.nodes[:1], 1990, make([]byte, 20))
		d.a.outage = true
		d.a.media.at = d.a.media.ops + 1
		d.a.commit(false, 0)
		d.until("died", func() bool { return !d.a.up() })
		d.b.open()
		d.sleep(d.timeout)
		d.a.open()
		marked := false
		d.until("in sync", func() bool {
			if v := d.b.v; v != nil && !marked { // as a power failure of its own may leave it
				if _, marked = v.table.get(7); marked {
					takenAnew(v)
				}
			}
			return d.a.up() && d.b.up() && d.inSync()
		})
		d.settled()
	})
}
