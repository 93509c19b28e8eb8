package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap/zaptest"

	"github.com/nvmmirror/nvmmirror/pmem"
)

func shm(t testing.TB) string {
	t.Helper()
	d, err := os.MkdirTemp("/dev/shm", "nvmmirror-test-")
	if err != nil {
		t.Skip("needs /dev/shm: ", err)
	}
	t.Cleanup(func() { os.RemoveAll(d) })
	return d
}

func TestSmokeStandalone(t *testing.T) {
	path := filepath.Join(shm(t), "r")
	if err := Create(path, CreateOptions{Size: 8 << 20, JournalSize: 2 << 20, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
	v, err := Open(path, Options{Logger: zaptest.NewLogger(t)})
	if err != nil {
		t.Fatal(err)
	}
	ctx := context.Background()
	for i := range 10000 {
		tx := v.Begin()
		tx.Write(int64(i%1000)*100, []byte{byte(i), byte(i >> 8), 3})
		tx.Write(int64(i%500)*8000+4096, bytes.Repeat([]byte{byte(i)}, i%5000))
		if _, err := tx.Commit(ctx); err != nil {
			t.Fatal(i, err)
		}
	}
	buf := make([]byte, 8<<20)
	if _, err := v.ReadAt(buf, 0); err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", v.Status())
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	v, err = Open(path, Options{Logger: zaptest.NewLogger(t)})
	if err != nil {
		t.Fatal(err)
	}
	buf2 := make([]byte, 8<<20)
	if _, err := v.ReadAt(buf2, 0); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(buf, buf2) {
		t.Fatal("differs")
	}
	v.Close()
}

// What a device holds is cleared unless it is a region, or cannot be read.
func TestClaim(t *testing.T) {
	needFaults(t)
	mem := emulated(t, smallSize, smallJournal)
	n := int64(len(mem.Bytes()))
	before := bytes.Clone(mem.Bytes())
	if err := claim(mem, n); err == nil || !strings.Contains(err.Error(), "holds a region already") || !bytes.Equal(mem.Bytes(), before) {
		t.Fatalf("a region: %v", err)
	}
	mem.Write(0, bytes.Repeat([]byte{7}, 2*metaArea)) // what another program left there
	if err := claim(mem, n); err != nil || !bytes.Equal(mem.Bytes(), make([]byte, n)) {
		t.Fatalf("no region: %v, or it was not cleared", err)
	}
	poison(t, mem.Bytes(), metaArea)
	var fault *pmem.FaultError
	if err := claim(mem, n); !errors.As(err, &fault) || fault.Offset&^4095 != metaArea {
		t.Fatalf("a page that cannot be read: %v", err)
	}
}

// What lies before the volume is told of as what lies behind it.
func TestOutOfRange(t *testing.T) {
	v := openQuiet(t, newImage(t, 1<<20, smallJournal))
	_, read := v.ReadAt(make([]byte, 1), -1)
	_, before := v.WriteAt([]byte{1}, -1)
	_, behind := v.WriteAt([]byte{1}, 1<<20)
	for i, err := range []error{read, before, behind} {
		if !errors.Is(err, ErrOutOfRange) || !strings.Contains(err.Error(), "outside of the volume") {
			t.Errorf("%d: %v", i, err)
		}
	}
}

// One read holds up commits for no longer than MaxRead bytes take.
func TestReadAtMost(t *testing.T) {
	v := openQuiet(t, newImage(t, MaxRead+blockSize, smallJournal))
	p := make([]byte, MaxRead+1)
	if n, err := v.ReadAt(p, 0); n != 0 || err == nil || !strings.Contains(err.Error(), "read piece by piece") {
		t.Errorf("%d bytes, %v", n, err)
	}
	if n, err := v.ReadAt(p[:MaxRead], 1); n != MaxRead || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
}

// A region that was copied to memory of a weaker class is not served from there.
func TestOnWeakerMemory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r")
	err := Create(path, CreateOptions{Size: 1 << 20, JournalSize: 2 << 20, Accept: pmem.Paged})
	if weak := (*pmem.ClassError)(nil); errors.As(err, &weak) {
		t.Skip("needs a directory that is not on memory: ", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	region, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	moved := filepath.Join(shm(t), "r")
	if err := os.WriteFile(moved, region, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = Open(moved, Options{})
	if weaker := (*WeakerError)(nil); !errors.As(err, &weaker) || weaker.Created <= pmem.Emulated || weaker.Have != pmem.Emulated {
		t.Fatalf("%v", err)
	}
	if now, err := os.ReadFile(moved); err != nil || !bytes.Equal(now, region) {
		t.Errorf("it was changed: %v", err)
	}
}
