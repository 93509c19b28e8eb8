package nvmmirror_test

import (
	"context"
	"fmt"
	"log"
	"os"
	"path/filepath"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// A volume on emulated memory, standalone. With Options.Peer the same program
// is one node of a mirrored pair.
func Example() {
	dir, err := os.MkdirTemp("/dev/shm", "nvmmirror-example-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "vol0.nvm")

	err = nvmmirror.Create(path, nvmmirror.CreateOptions{Size: 16 << 20, Accept: pmem.Emulated})
	if err != nil {
		log.Fatal(err)
	}
	v, err := nvmmirror.Open(path, nvmmirror.Options{})
	if err != nil {
		log.Fatal(err)
	}
	defer v.Close()

	tx := v.Begin()
	tx.Write(0, []byte("both of these writes"))
	tx.Write(8192, []byte("or none of them"))
	if _, err := tx.Commit(context.Background()); err != nil {
		log.Fatal(err)
	}

	p := make([]byte, 20)
	if _, err := v.ReadAt(p, 0); err != nil {
		log.Fatal(err)
	}
	fmt.Printf("%s\n", p)
	// Output: both of these writes
}
