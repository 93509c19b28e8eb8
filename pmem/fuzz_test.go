package pmem

import (
	"os"
	"path/filepath"
	"testing"
)

// FuzzBadBlocks reads any text as sysfs's list of bad blocks: what is taken can
// be computed with.
func FuzzBadBlocks(f *testing.F) {
	f.Add([]byte("0 1\n8 16\n"), int64(0), int64(1<<40))
	f.Add([]byte("\n  \n4 2"), int64(2048), int64(512))
	f.Add([]byte("-1 5\n"), int64(0), int64(4096))
	f.Add([]byte("36028797018963967 1\n"), int64(1<<62), int64(1<<62))
	f.Add([]byte("9223372036854775807 9223372036854775807\n"), int64(0), int64(1<<62))
	f.Fuzz(func(t *testing.T, text []byte, from, size int64) {
		name := filepath.Join(t.TempDir(), "badblocks")
		if err := os.WriteFile(name, text, 0o600); err != nil {
			t.Fatal(err)
		}
		list, ok, err := readBadBlocks(name)
		if !ok && err == nil || err != nil && list != nil {
			t.Fatalf("%v, %v along with %v", list, ok, err)
		}
		for _, r := range list {
			if r.Offset < 0 || r.Length <= 0 || r.Offset+r.Length < r.Offset {
				t.Fatalf("%q became %+v", text, r)
			}
		}
		if from < 0 || size < 0 || from+size < from {
			return // no device is there
		}
		for _, r := range cut(list, from, size) {
			if r.Offset < 0 || r.Length <= 0 || r.Offset+r.Length > size {
				t.Fatalf("%+v of a device of %d bytes", r, size)
			}
		}
	})
}
