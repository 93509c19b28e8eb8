package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// A clean close notes where the log ends, for the next open, which then
// searches nothing; while the region is open the note is gone.
func TestCleanCloseNotesTheEnd(t *testing.T) {
	mem := newImage(t, 1<<20, MinJournal)
	v := openQuiet(t, mem)
	if _, err := (transaction{{0, []byte("x")}}).commit(v); err != nil {
		t.Fatal(err)
	}
	end := v.journal.End()
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	c, err := readMetadata(mem)
	if err != nil {
		t.Fatal(err)
	}
	if m := c.meta; !m.Clean || !m.Settled || m.End != end {
		t.Fatalf("clean %v, settled %v, the log ends at %d, noted is %d", m.Clean, m.Settled, end, m.End)
	}
	scan, err := survey(mem.b, c.meta, nil)
	if err != nil || scan.End != end || scan.Damage != nil {
		t.Fatalf("%+v, %v", scan, err)
	}
	openQuiet(t, mem)
	if c, err = readMetadata(mem); err != nil || c.meta.Clean || c.meta.Settled || c.meta.End != 0 {
		t.Fatalf("of an open region: %+v, %v", c.meta, err)
	}
}

// A start that cannot listen, as where the address is not there yet, changes
// nothing of the region: it stays closed cleanly.
func TestFailedStartStaysClean(t *testing.T) {
	path := filepath.Join(shm(t), "r")
	if err := Create(path, CreateOptions{Size: smallSize, JournalSize: smallJournal, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
	v, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := v.WriteAt([]byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	plain, err := transport.NewPlain(netip.MustParseAddr("192.0.2.2"), transport.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = Open(path, Options{Peer: &Peer{Listen: "192.0.2.1:7447", Address: "192.0.2.2:7447", Transport: plain}}); err == nil {
		t.Fatal("it listens at an address of a network for documentation")
	}
	after, readErr := os.ReadFile(path)
	if readErr != nil || !bytes.Equal(before, after) {
		t.Fatalf("the region has changed: %v; %v", readErr, err)
	}
}

// A standalone region with damage in its journal opens where the loss is accepted,
// and serves.
func TestAcceptLossStandalone(t *testing.T) {
	c := makeCrashed(t)
	path := filepath.Join(shm(t), "r")
	damaged := flipped(c.applied, c, len(c.states)-5)
	write := func() {
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write()
	var damage *DamageError
	if _, err := Open(path, Options{}); !errors.As(err, &damage) || !strings.Contains(err.Error(), "--accept-loss") {
		t.Fatalf("%v", err)
	}
	v, err := Open(path, Options{AcceptLoss: true})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	s := v.Status()
	if !s.Serving || s.Role != "primary" || (*node)(v).Damaged() {
		t.Fatalf("%+v", s)
	}
	if _, err := v.WriteAt([]byte("after"), 0); err != nil {
		t.Fatal(err)
	}
}

// TestFlipBelowTheNotedEnd: where a clean close has noted the end of the log, what
// is invalid below is damage, and not a torn tail, also above what is known to be
// acknowledged.
func TestFlipBelowTheNotedEnd(t *testing.T) {
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Block}})
	b.close()
	before := a.Status().Committed
	waiting := begin(context.Background(), a, 100, []byte("durable here, and perhaps there"))
	a.until("written", func(s Status) bool { return s.Committed > before })
	a.close()
	if err := <-waiting; !errors.Is(err, ErrOutcomeUnknown) {
		t.Fatal(err)
	}
	a.change(func(region []byte) {
		m := metadataOf(t, region)
		if !m.Clean || m.End <= m.Checkpoint.LSN {
			t.Fatalf("clean %v, checkpoint %d, end %d", m.Clean, m.Checkpoint.LSN, m.End)
		}
		ring := journal.Ring{Bytes: region[m.Journal.Off:m.Journal.end()], Base: m.RingBase}
		region[m.Journal.Off+int64(ring.Position(m.Checkpoint.LSN))+70] ^= 1
	})
	r, err := Check(a.path)
	if err != nil || !r.Damaged || len(r.Findings) != 1 || !strings.Contains(r.Findings[0].Problem, "the log was closed at LSN") {
		t.Errorf("check: %v, %+v", err, r)
	}
	stop, err := InspectJournal(a.path, JournalOptions{}, func(*SegmentInfo) error { return nil })
	if err != nil || !stop.Damaged || stop.Ending != EndDamaged {
		t.Errorf("the journal's reader: %v, %+v", err, stop)
	}
	core, logged := observer.New(zap.ErrorLevel)
	a.opt.Logger = zap.New(core)
	a.open()
	if logged.FilterMessageSnippet("journal damaged").Len() != 1 {
		t.Errorf("opening it says nothing of it: %v", logged.All())
	}
	b.open()
	a.until("in sync", func(s Status) bool { return s.Peer == "in-sync" })
}

// TestWrongFileKeepsItsHoles: a file that is no region, or not all of one, is
// refused before its holes are filled.
func TestWrongFileKeepsItsHoles(t *testing.T) {
	for name, write := range map[string]func(f *os.File) error{
		"foreign": func(f *os.File) error {
			_, err := f.WriteAt([]byte("not a region"), 0)
			return errors.Join(err, f.Truncate(64<<20))
		},
		"empty": func(f *os.File) error { return f.Truncate(64 << 20) },
		"cut off": func(f *os.File) error {
			mem := newImage(t, 64<<20, smallJournal)
			_, err := f.WriteAt(mem.b[:2*metaArea], 0)
			return errors.Join(err, f.Truncate(int64(len(mem.b))-blockSize))
		},
	} {
		for _, dir := range []string{shm(t), t.TempDir()} {
			t.Run(name, func(t *testing.T) {
				path := filepath.Join(dir, name)
				f, err := os.Create(path)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if err := write(f); err != nil {
					t.Fatal(err)
				}
				var before, after unix.Stat_t
				if err := unix.Stat(path, &before); err != nil {
					t.Fatal(err)
				}
				_, err = Open(path, Options{Logger: nopLogger})
				var length *LengthError
				if !errors.Is(err, ErrNotRegion) && !errors.As(err, &length) || !strings.Contains(err.Error(), path) {
					t.Errorf("%v", err)
				}
				if err := unix.Stat(path, &after); err != nil || after.Blocks != before.Blocks {
					t.Errorf("%d KiB of it are allocated, %d before: %v", after.Blocks/2, before.Blocks/2, err)
				}
			})
		}
	}
}

// A close that the device does not confirm is not a clean one: nothing is lost, and
// the next open recovers instead of trusting what may not have reached the medium.
func TestCloseThatTheDeviceDoesNotConfirm(t *testing.T) {
	for _, confirmed := range []bool{true, false} {
		core, logged := observer.New(zap.WarnLevel)
		path := filepath.Join(shm(t), "r")
		if err := Create(path, CreateOptions{Size: smallSize, JournalSize: smallJournal, Accept: pmem.Emulated}); err != nil {
			t.Fatal(err)
		}
		v, err := Open(path, Options{Logger: zap.New(core)})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.WriteAt([]byte("kept"), 100); err != nil {
			t.Fatal(err)
		}
		if !confirmed {
			unsyncable(t, path)
		}
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		if n := logged.FilterMessage("not closed cleanly").Len(); (n == 0) != confirmed {
			t.Errorf("confirmed %v: logged %v", confirmed, logged.All())
		}
		again, err := Open(path, Options{Logger: nopLogger})
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, 4)
		if _, err := again.ReadAt(p, 100); err != nil || string(p) != "kept" || again.recovery.Clean != confirmed {
			t.Errorf("confirmed %v: %q, %v, %+v", confirmed, p, err, again.recovery)
		}
		again.Close()
	}
}

// unsyncable puts a pipe, which fsync(2) refuses, behind this process's descriptor of
// the file: its mapping stays.
func unsyncable(t *testing.T, path string) {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	defer r.Close()
	done := 0
	for _, e := range fds {
		fd, _ := strconv.Atoi(e.Name())
		if name, err := os.Readlink("/proc/self/fd/" + e.Name()); err != nil || name != path {
			continue
		}
		if err := unix.Dup3(int(r.Fd()), fd, unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		done++
	}
	if done != 1 {
		t.Fatalf("%d descriptors of %s", done, path)
	}
}
