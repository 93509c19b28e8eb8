package nvmmirror

import (
	"bytes"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// A clean close notes where the log ends, for the next open, which then
// searches nothing; while the region is open the note is gone.
func TestCleanCloseNotesTheEnd(t *testing.T) {
	mem := newImage(t, 1<<20, MinJournal)
	v := openQuiet(t, mem)
	if _, err := (transaction{{0, []byte("x")}}).commit(v); err != nil {
		t.Fatal(err)
	}
	end := v.journal.End()
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	c, err := readMetadata(mem.b)
	if err != nil {
		t.Fatal(err)
	}
	if m := c.meta; !m.Clean || !m.Settled || m.End != end {
		t.Fatalf("clean %v, settled %v, the log ends at %d, noted is %d", m.Clean, m.Settled, end, m.End)
	}
	scan, err := survey(mem.b, c.meta, nil)
	if err != nil || scan.End != end || scan.Damage != nil {
		t.Fatalf("%+v, %v", scan, err)
	}
	openQuiet(t, mem)
	if c, err = readMetadata(mem.b); err != nil || c.meta.Clean || c.meta.Settled || c.meta.End != 0 {
		t.Fatalf("of an open region: %+v, %v", c.meta, err)
	}
}

// A start that cannot listen, as where the address is not there yet, changes
// nothing of the region: it stays closed cleanly.
func TestFailedStartStaysClean(t *testing.T) {
	path := filepath.Join(shm(t), "r")
	if err := Create(path, CreateOptions{Size: smallSize, JournalSize: smallJournal, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
	v, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := transport.NewPlain(netip.MustParseAddr("192.0.2.2"), transport.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = Open(path, Options{Peer: &Peer{Listen: "192.0.2.1:7447", Address: "192.0.2.2:7447", Transport: plain}}); err == nil {
		t.Fatal("it listens at an address of a network for documentation")
	}
	after, readErr := os.ReadFile(path)
	if readErr != nil || !bytes.Equal(before, after) {
		t.Fatalf("the region has changed: %v; %v", readErr, err)
	}
}

// A standalone region with damage in its journal opens where the loss is accepted,
// and serves.
func TestAcceptLossStandalone(t *testing.T) {
	c := makeCrashed(t)
	path := filepath.Join(shm(t), "r")
	damaged := flipped(c.applied, c, len(c.states)-5)
	write := func() {
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write()
	var damage *DamageError
	if _, err := Open(path, Options{}); !errors.As(err, &damage) || !strings.Contains(err.Error(), "--accept-loss") {
		t.Fatalf("%v", err)
	}
	v, err := Open(path, Options{AcceptLoss: true})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	s := v.Status()
	if !s.Serving || s.Role != "primary" || (*node)(v).Damaged() {
		t.Fatalf("%+v", s)
	}
	if _, err := v.WriteAt([]byte("after"), 0); err != nil {
		t.Fatal(err)
	}
}
