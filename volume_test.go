package nvmmirror

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
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
