package nvmmirror

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"text/tabwriter"
	"unsafe"

	"golang.org/x/sys/unix"
)

// TestMedia flips bits in regions, closed and open, alone and in a pair, takes
// pages and file ends away, and says for each what became of it. Nothing wrong
// may be read, and nothing wrong may reach the other node.
func TestMedia(t *testing.T) {
	if raceEnabled {
		t.Skip("it changes memory behind the back of running volumes: about races between them the other tests of pairs say as much, in less time")
	}
	t.Parallel()
	m := &media{seed: 3303}
	t.Logf("seed %d", m.seed)
	t.Run("all", func(t *testing.T) {
		for name, f := range map[string]func(*testing.T, *media){
			"closed": mediaClosed, "live data": mediaLiveData, "live metadata": mediaLiveMetadata, "live journal": mediaLiveJournal,
			"pair live": mediaPairLive, "pair down": mediaPairDown, "pair both metadata copies": mediaPairNoMetadata,
			"pair full copy": mediaPairCopy, "promoted": mediaPromoted, "no hint": mediaAboveTheHint,
		} {
			t.Run(name, func(t *testing.T) { t.Parallel(); f(t, m) })
		}
	})
	t.Log("\n" + m.String())
}

// media gathers what became of the flips.
type media struct {
	seed uint64
	mu   sync.Mutex
	rows []mediaRow
}

// mediaRow is about the flips in one area of one kind of region.
type mediaRow struct {
	where, area string
	flips       int
	found       string // by what
	repaired    int    // from the other copy, the log or the peer
	reported    int    // by an error, as long as nothing repairs it
	unjudged    int    // one node alone cannot tell
	peer        int    // of those, found with the peer
}

func (m *media) add(r mediaRow) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := range m.rows {
		if o := &m.rows[i]; o.where == r.where && o.area == r.area {
			o.flips, o.repaired, o.reported = o.flips+r.flips, o.repaired+r.repaired, o.reported+r.reported
			o.unjudged, o.peer = o.unjudged+r.unjudged, o.peer+r.peer
			return
		}
	}
	m.rows = append(m.rows, r)
}

func (m *media) rng(salt uint64) *rand.Rand { return rand.New(rand.NewPCG(m.seed, salt)) }

func (m *media) String() string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprintln(w, "region\tarea\tflips\tfound by\trepaired\treported\tone node cannot tell\tof these found with the peer")
	for _, r := range m.rows {
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\t%d\t%d\t%d\t%d\n", r.where, r.area, r.flips, r.found, r.repaired, r.reported, r.unjudged, r.peer)
	}
	w.Flush()
	return b.String()
}

// twin is a second mapping of a region's file, as a fault in the medium would
// change it: behind the back of who has it open.
func twin(t testing.TB, path string) []byte {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(b) })
	return b
}

// needFaults skips where a SIGBUS does not say its address, under qemu-user:
// the process cannot then tell whose page it was.
func needFaults(t testing.TB) {
	t.Helper()
	if runtime.GOARCH == "amd64" {
		return // never without
	}
	f, err := os.Create(filepath.Join(shm(t), "cut"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	page := os.Getpagesize()
	f.Truncate(int64(page))
	p, err := unix.Mmap(int(f.Fd()), 0, page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(p)
	f.Truncate(0)
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		e := recover()
		at, ok := e.(interface{ Addr() uintptr })
		if !ok || at.Addr() == 0 {
			t.Skip("SIGBUS comes without its address: qemu-user does not pass it on")
		}
	}()
	_ = p[0]
}

// poison makes the page at off of a mapping one that cannot be read: by
// MADV_HWPOISON where the kernel has it, else by a hole that nothing fills,
// which raises the same signal. It reports whether the file's page is bad, and not
// this mapping's alone.
func poison(t testing.TB, mem []byte, off int64) (real bool) {
	t.Helper()
	page := int64(os.Getpagesize())
	p := mem[off&^(page-1):][:page]
	if unix.Madvise(p, unix.MADV_HWPOISON) == nil {
		return true
	}
	fd, err := unix.MemfdCreate("hole", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	at := unsafe.Pointer(unsafe.SliceData(p))
	if _, err := unix.MmapPtr(fd, 0, at, uintptr(page), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_FIXED); err != nil {
		t.Fatal(err)
	}
	return false
}

// isCorrupt reports whether a read was refused because bytes at rest are wrong
// and nobody could repair them.
func isCorrupt(err error) bool {
	var c *CorruptError
	return errors.As(err, &c)
}

// unharmed checks that a node's data is the model, byte for byte.
func unharmed(t testing.TB, n *testNode, model []byte) {
	t.Helper()
	n.applyMu.RLock()
	defer n.applyMu.RUnlock()
	data := n.mem.Bytes()[n.data.Off:][:n.size]
	for b := int64(0); b < n.size; b += blockSize {
		if string(data[b:b+blockSize]) != string(model[b:b+blockSize]) {
			t.Fatalf("%s: block %d holds something else: what flipped on the other node reached it", n.name, b/blockSize)
		}
	}
}

func randomBytes(rng *rand.Rand, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return p
}
