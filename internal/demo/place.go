package demo

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// Sizes of a region. Two of them fit into the 64 MiB that a container's
// /dev/shm has.
const (
	volumeSize  = smallSlots*smallSlot + largeSlots*largeSlot
	journalSize = 10 << 20
	regionFile  = 4<<20 + journalSize + 2<<20 + volumeSize // metadata, journal, block table, data
	needed      = 2*regionFile + 1<<20
)

// maxBase is how long a directory's name may be: sockets lie in it, whose
// paths the kernel limits to 107 bytes.
const maxBase = 107 - len("/nvmmirror-demo-0123456789/a.sock")

// place is where regions, sockets and logs go.
type place struct {
	base  string
	tmpfs bool // else an ordinary file system: paged memory
}

// choosePlace takes the first tmpfs with room, else any directory with room.
func choosePlace() (place, error) {
	var fallback place
	var reasons []string
	for _, base := range []string{"/dev/shm", os.Getenv("XDG_RUNTIME_DIR"), os.TempDir()} {
		if base == "" {
			continue
		}
		p, err := lookAt(base)
		switch {
		case err != nil:
			reasons = append(reasons, fmt.Sprintf("%s: %v", base, err))
		case p.tmpfs:
			return p, nil
		case fallback.base == "":
			fallback = p
		}
	}
	if fallback.base == "" {
		return place{}, fmt.Errorf("no directory for %d MiB of regions: %s; set TMPDIR to one", needed>>20, strings.Join(reasons, "; "))
	}
	return fallback, nil
}

func lookAt(base string) (p place, err error) {
	if len(base) > maxBase {
		return p, fmt.Errorf("its name is longer than %d bytes, too long for sockets in it", maxBase)
	}
	if err := unix.Access(base, unix.W_OK|unix.X_OK); err != nil {
		return p, err
	}
	var fs unix.Statfs_t
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.Statfs(base, &fs)
	}
	if err != nil {
		return p, err
	}
	// A tmpfs without a limit has no blocks.
	if room := int64(fs.Bavail) * int64(fs.Bsize); fs.Blocks != 0 && room < needed {
		return p, fmt.Errorf("%d MiB free", room>>20)
	}
	return place{base, uint32(fs.Type) == unix.TMPFS_MAGIC}, nil
}

// make makes the directory.
func (p place) make() (string, error) { return os.MkdirTemp(p.base, "nvmmirror-demo-") }

// accept is the flag that create needs here.
func (p place) accept() string {
	if p.tmpfs {
		return "--emulate"
	}
	return "--allow-paged"
}

// memory says what the regions lie on.
func (p place) memory() string {
	if p.tmpfs {
		return "tmpfs: emulated memory"
	}
	return "no tmpfs has room: paged memory"
}
