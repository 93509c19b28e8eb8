package chaos

import (
	"bytes"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror"
)

// viewData maps the data of a region that may be in use, to look past the
// daemon at what is really there.
func viewData(t *testing.T, path string) []byte {
	t.Helper()
	in, err := nvmmirror.Inspect(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b, err := unix.Mmap(int(f.Fd()), in.Data.Offset, int(in.Data.Length), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Munmap(b); err != nil {
			t.Error(err)
		}
	})
	return b
}

// identical stops a pair that is in sync, and compares the two regions: every
// byte of the data, and what check says of journal and block table.
func (p *pair) identical() {
	p.t.Helper()
	p.settle()
	p.a.stop()
	p.b.stop()
	a, b := viewData(p.t, p.a.region), viewData(p.t, p.b.region)
	if len(a) != len(b) {
		p.t.Fatalf("volumes of %d and %d bytes", len(a), len(b))
	}
	const block = 4096
	differ := 0
	for off := 0; off < len(a); off += block {
		if !bytes.Equal(a[off:off+block], b[off:off+block]) {
			if differ++; differ <= 5 {
				p.t.Errorf("block %d differs", off/block)
			}
		}
	}
	if differ > 0 {
		p.t.Errorf("%d blocks differ", differ)
	}
	for _, n := range []*node{p.a, p.b} {
		report, err := nvmmirror.Check(n.region)
		if err != nil {
			p.t.Fatalf("check of %s: %v", n.name, err)
		}
		if len(report.Findings) > 0 {
			p.t.Errorf("check of %s finds %+v", n.name, report.Findings)
		}
	}
}
