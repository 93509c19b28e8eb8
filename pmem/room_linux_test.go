package pmem

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// More than the memory that there is must be refused before any of it is
// taken: the kernel would kill processes. The file is open for reading only, so
// that an allocate which does not ask first gets another error, and no memory.
func TestNoRoomInMemory(t *testing.T) {
	path := filepath.Join(tmpfsDir(t), "region")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	free := availableMemory()
	if free < 1<<20 || free > 1<<50 {
		t.Fatalf("%d bytes of memory available", free)
	}
	var e *AllocError
	err = allocate(f, path, free+1<<30)
	if !errors.As(err, &e) || !errors.Is(err, unix.ENOSPC) || e.Free <= 0 || e.Free > free+1<<29 {
		t.Fatalf("%v", err)
	}
	if !strings.Contains(err.Error(), "a smaller size") {
		t.Errorf("%v", err)
	}
	if err := room(f, path, 1<<20); err != nil {
		t.Fatal(err)
	}
}
