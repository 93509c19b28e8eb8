package nvmmirror

import (
	"bytes"
	"errors"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror/pmem"
)

// sourceLost is a region whose journal cannot be read any more once a block is stored.
type sourceLost struct {
	*pmem.Region
	armed extent // of the data
	ring  []byte
	err   error
}

func (m *sourceLost) Copy(off int64, p []byte) {
	if m.armed.Off <= off && off < m.armed.end() {
		m.err = errors.Join(m.err, unix.Mprotect(m.ring, unix.PROT_NONE))
	}
	m.Region.Copy(off, p)
}

// TestJournalLostWhileApplied: memory of the journal that cannot be read any more after
// its segment was verified is the journal's damage. The block that it goes to is sound,
// and stays as it was.
func TestJournalLostWhileApplied(t *testing.T) {
	needFaults(t)
	path := filepath.Join(shm(t), "r")
	if err := Create(path, CreateOptions{Size: smallSize, JournalSize: smallJournal, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
	r, err := pmem.Open(path, pmem.Options{Accept: pmem.Emulated})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Close() })
	mem := &sourceLost{Region: r}
	v := openQuiet(t, mem)
	v.region = r // so that it can replace memory
	old := bytes.Repeat([]byte("old."), blockSize/4)
	if _, err := v.WriteAt(old, blockSize); err != nil {
		t.Fatal(err)
	}
	mem.ring = r.Bytes()[v.ring.Off:v.ring.end()]
	mem.armed = v.data
	_, err = v.WriteAt(bytes.Repeat([]byte("new."), blockSize/4), blockSize)
	if e := unix.Mprotect(mem.ring, unix.PROT_READ|unix.PROT_WRITE); e != nil || mem.err != nil {
		t.Fatal(e, mem.err)
	}
	var fault *pmem.FaultError
	if !errors.As(err, &fault) || fault.Offset < v.ring.Off || fault.Offset >= v.ring.end() {
		t.Fatalf("not a fault of the journal: %v", err)
	}
	if e, ok := v.table.get(1); !ok || e.damaged || !bytes.Equal(v.block(1), old) {
		t.Errorf("the block that was to be changed: %+v, %t, holds %q", e, ok, v.block(1)[:8])
	}
}
