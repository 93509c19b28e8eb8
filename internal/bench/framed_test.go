package bench

import (
	"crypto/md5"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

func TestFramedFindsCorruption(t *testing.T) {
	for name, d := range map[string]func() digest{
		"md5": func() digest { return newMD5([]byte("key")) },
		"crc": func() digest { return crc{} },
	} {
		t.Run(name, func(t *testing.T) {
			fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				t.Fatal(err)
			}
			a, b := newFramed(&rawLink{fd: fds[0]}, d()), newFramed(&rawLink{fd: fds[1]}, d())
			defer a.close()
			defer b.close()
			got := make([]byte, 4)
			if err := errors.Join(a.send([]byte("good")), full(b, got)); err != nil || string(got) != "good" {
				t.Fatalf("%q, %v", got, err)
			}
			digest := make([]byte, a.d.size())
			if err := a.d.sum(digest, []byte("good")); err != nil {
				t.Fatal(err)
			}
			if err := a.rawLink.send(append([]byte("goof"), digest...)); err != nil {
				t.Fatal(err)
			}
			if err := full(b, got); !errors.Is(err, errDigest) {
				t.Errorf("%q, %v", got, err)
			}
		})
	}
}

func TestMD5IsKeyed(t *testing.T) {
	var got [md5.Size]byte
	if err := newMD5([]byte("key")).sum(got[:], []byte("data")); err != nil || got != md5.Sum([]byte("datakey")) {
		t.Errorf("%x, %v", got, err)
	}
}

// The kernel's digest is the same one, so the ends could mix them.
func TestALG(t *testing.T) {
	if err := probeALG(); err != nil {
		t.Skip("needs AF_ALG: ", err)
	}
	d, err := newALG([]byte("key"), &rawLink{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.close()
	for _, n := range []int{1, 64, 4096, chunk} {
		var got [md5.Size]byte
		p := make([]byte, n)
		if err := d.sum(got[:], p); err != nil || got != md5.Sum(append(p, "key"...)) {
			t.Errorf("%d bytes: %x, %v", n, got, err)
		}
	}
}

func TestResidentBeside(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a file")
	const n = 32 << 20
	if err := os.WriteFile(path, make([]byte, n), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, n, unix.PROT_READ, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(m)
	all, err := residentBeside("")
	if err != nil {
		t.Fatal(err)
	}
	beside, err := residentBeside(path)
	if err != nil {
		t.Fatal(err)
	}
	// The two are taken one after the other: the rest may have changed.
	if all-beside < n-1<<20 || all-beside > n+8<<20 {
		t.Errorf("%d bytes less of %d: the mapping has %d", all-beside, all, n)
	}
}
