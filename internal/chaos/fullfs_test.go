package chaos

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror"
)

// smallPair is a pair whose first writes leave most of its regions untouched.
func smallPair(t *testing.T) *pair {
	return newPair(t, pairConfig{policy: nvmmirror.Block, timeout: time.Second, size: 4 << 20, journal: nvmmirror.MinJournal, seed: seedOf(t)})
}

// names are those of a node's files.
func (f *tmpfs) names() []string {
	f.t.Helper()
	list, err := os.ReadDir(f.dir)
	if err != nil {
		f.t.Fatal(err)
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

// A region in use has all the space that it will ever need, and a start needs
// none: on full file systems the pair fills its volume, wraps its journal,
// restarts and fails over. What has to write a file says that there is no
// space, and leaves none behind.
func TestFullFileSystem(t *testing.T) {
	p := smallPair(t)
	fs := p.a.fs
	copied := filepath.Join(fs.dir, "copy.nvm")
	whole, err := os.ReadFile(p.a.region)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(copied, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*node{p.a, p.b} {
		n.fs.fill()
	}
	before := fs.names()
	for _, c := range [][]string{
		{"create", filepath.Join(fs.dir, "new.nvm"), "--emulate", "--size", "4MiB", "--journal-size", "2MiB"},
		{"key", "generate", filepath.Join(fs.dir, "new.key")},
		{"key", "generate", "--tls", filepath.Join(fs.dir, "tls")},
		{"serve", "--config", p.a.config}, // it runs already: refused, and nothing written
	} {
		out, err := exec.Command(program, c...).CombinedOutput()
		if wanted := c[0] == "serve" || strings.Contains(string(out), "no space left on device"); exitCode(err) != 1 || !wanted {
			t.Errorf("%v: %v: %s", c, err, out)
		}
	}
	for _, c := range [][]string{
		{"journal", "dump", copied, "-o", "json"}, {"journal", "ls", copied}, {"info", copied}, {"check", copied, "-o", "json"},
		{"status", "--socket", p.a.socket}, {"status", "--socket", p.a.socket, "-o", "json"},
		{"read", "--socket", p.a.socket, "--offset", "0", "--length", "64KiB"}, {"journal", "dump", "--socket", p.a.socket},
	} {
		fs.outputTo(c)
	}
	if after := fs.names(); !slices.Equal(before, after) {
		t.Errorf("files before %v, after %v", before, after)
	}

	want := p.writeAll(p.a, 1)
	p.b.kill()
	p.b.start()
	p.inSync()
	p.a.kill()
	if _, err := p.b.admin.Promote(t.Context(), false); err != nil {
		t.Fatalf("promote b: %v", err)
	}
	p.a.start()
	p.inSync()
	p.mustRead(p.b, want)
	want = p.writeAll(p.b, 2)
	p.mustRead(p.b, want)
	p.identical()
	for _, n := range []*node{p.a, p.b} {
		if n.fs.free() != 0 {
			t.Errorf("%d bytes are free at %s: this was no full file system", n.fs.free(), n.name)
		}
	}
}

// outputTo runs a command whose output goes to a file for which there is no
// space: it must not end as if all were written.
func (f *tmpfs) outputTo(c []string) {
	f.t.Helper()
	out, err := os.OpenFile(f.dir, unix.O_TMPFILE|os.O_WRONLY, 0o600)
	if err != nil {
		f.t.Fatal(err)
	}
	defer out.Close()
	var said bytes.Buffer
	cmd := exec.Command(program, c...)
	cmd.Stdout, cmd.Stderr = out, &said
	if err := cmd.Run(); exitCode(err) != 1 || !strings.Contains(said.String(), "no space left on device") {
		f.t.Errorf("%v: %v: %s", c, err, &said)
	}
}

func exitCode(err error) int {
	var e *exec.ExitError
	if errors.As(err, &e) {
		return e.ExitCode()
	}
	return -1
}

// writeAll writes the whole volume some times over, which wraps the journal.
func (p *pair) writeAll(to *node, seed byte) []byte {
	p.t.Helper()
	data := make([]byte, 4<<20)
	for round := range byte(3) {
		for i := range data {
			data[i] = seed*16 + round + byte(i>>8) + 1
		}
		const piece = 256 << 10
		for off := 0; off < len(data); off += piece {
			if _, err := to.admin.Write(p.t.Context(), int64(off), data[off:off+piece], writeTime); err != nil {
				p.t.Fatalf("write at %d of %s: %v", off, to.name, err)
			}
		}
	}
	return data
}

func (p *pair) mustRead(from *node, want []byte) {
	p.t.Helper()
	got := make([]byte, len(want))
	poll(p.t, syncTime, "read "+from.name, func() (bool, string) {
		err := from.admin.Read(p.t.Context(), 0, got)
		return err == nil, fmt.Sprint(err)
	})
	if !bytes.Equal(got, want) {
		p.t.Fatalf("%s holds other bytes", from.name)
	}
}

// A hole that somebody punches into the region of a running node, on a file
// system that then fills up, makes a store fault. No process dies of it, no
// wrong byte is served, nothing acknowledged is lost: the node acknowledges
// nothing more, the other one takes over, and with space again it comes back.
func TestHoleUnderARunningRegion(t *testing.T) {
	for _, c := range []struct {
		name    string
		primary bool // whose region it is
		journal bool // where the hole is
	}{
		{"data of the primary", true, false},
		{"journal of the primary", true, true},
		{"data of the secondary", false, false},
		{"journal of the secondary", false, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := smallPair(t)
			hit, other := p.b, p.a
			if c.primary {
				hit, other = p.a, p.b
			}
			acked := []byte("acknowledged before the hole")
			_, err := p.a.admin.Write(t.Context(), 0, acked, writeTime)
			if err != nil {
				t.Fatal(err)
			}
			p.settle()
			hit.punch(c.journal)
			hit.fs.fill()

			const piece, from, pieces = 256 << 10, 2 << 20, 6
			var known [pieces]bool // acknowledged
			failed := func() (bool, string) {
				if !hit.running() {
					return false, "it died: " + hit.lastLines()
				}
				s := strings.Join(hit.status().Degraded, "; ")
				return strings.Contains(s, "persistence failed"), s
			}
			for i := range pieces {
				_, err = p.a.admin.Write(t.Context(), from+int64(i)*piece, news(i, piece), time.Second)
				known[i] = err == nil
				if ok, _ := failed(); ok {
					break
				}
			}
			t.Logf("acknowledged: %v, and last: %v", known, err)
			poll(t, syncTime, "the node says what is wrong", failed)
			if c.primary {
				if _, err := hit.admin.Write(t.Context(), 8192, []byte("x"), time.Second); err == nil {
					t.Error("it still acknowledges")
				}
				hit.kill()
				if _, err := other.admin.Promote(t.Context(), false); err != nil {
					t.Fatalf("promote the other: %v", err)
				}
			} else {
				hit.kill()
			}
			out, err := exec.Command(program, "serve", "--config", hit.config).CombinedOutput()
			if exitCode(err) != 1 || !strings.Contains(string(out), "no space left on device") {
				t.Errorf("a start without the space: %v: %s", err, out)
			}
			hit.fs.drain()
			hit.start()
			primary, _ := p.inSync()
			p.mustRead(primary, acked)
			for i := range pieces {
				got := make([]byte, piece)
				if err := primary.admin.Read(t.Context(), from+int64(i)*piece, got); err != nil {
					t.Fatal(err)
				}
				if none := bytes.Equal(got, make([]byte, piece)); !bytes.Equal(got, news(i, piece)) && (known[i] || !none) {
					t.Errorf("transaction %d (acknowledged: %v) is lost, or half there", i+1, known[i])
				}
			}
			p.identical()
		})
	}
}

// news is what transaction i writes.
func news(i, n int) []byte { return bytes.Repeat([]byte{byte(i + 1)}, n) }

// punch takes the storage of zeros that were never written: the second half of
// a region's journal or data.
func (n *node) punch(journal bool) {
	n.t.Helper()
	in, err := nvmmirror.Inspect(n.region)
	if err != nil {
		n.t.Fatal(err)
	}
	area := in.Data
	if journal {
		area = in.Journal
	}
	f, err := os.OpenFile(n.region, os.O_RDWR, 0)
	if err != nil {
		n.t.Fatal(err)
	}
	defer f.Close()
	off, length := area.Offset+area.Length/2, area.Length/2
	was, err := io.ReadAll(io.NewSectionReader(f, off, length))
	if err != nil || !bytes.Equal(was, make([]byte, length)) {
		n.t.Fatalf("not zeros, or %v", err)
	}
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, length); err != nil {
		n.t.Fatal(err)
	}
}
