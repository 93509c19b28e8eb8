package pmem

import (
	"bytes"
	"os"
	"testing"
	"unsafe"
)

// Where it cannot be known what a file holds, nothing is written to it:
// /proc/self/mem takes writes, and knows of no holes.
func TestFillHolesWhereSeekFails(t *testing.T) {
	f, err := os.OpenFile("/proc/self/mem", os.O_RDWR, 0)
	if err != nil {
		t.Skip("needs /proc/self/mem: ", err)
	}
	defer f.Close()
	data := bytes.Repeat([]byte("data"), 1<<10)
	at := int64(uintptr(unsafe.Pointer(unsafe.SliceData(data))))
	if err := fillHoles(f, at, at+int64(len(data))); err == nil || !bytes.Equal(data, bytes.Repeat([]byte("data"), 1<<10)) {
		t.Errorf("%v; it holds %q", err, data[:8])
	}
}
