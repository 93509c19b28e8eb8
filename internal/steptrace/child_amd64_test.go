package steptrace

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"
	_ "unsafe" // linkname

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/pmem"
)

const (
	volumeSize = 512 << 10
	blockSize  = 4 << 10

	envScript = "NVMMIRROR_STEPTRACE" // "script path flush width first-transaction kill", in the child
)

// choice is how bytes reach memory: pmem's choice by what the CPU has, which
// no API offers to change. Only the traced child changes it.
//
//go:linkname choice github.com/nvmmirror/nvmmirror/pmem.detected
var choice primitives

// virtual: pmem reads each page of what it opens, for the sake of a virtual
// machine's host. Here that shows nothing, and is most of the time.
//
//go:linkname virtual github.com/nvmmirror/nvmmirror/pmem.virtual
var virtual bool

// primitives is laid out as pmem has it.
type primitives struct{ flush, width uint8 }

func TestMain(m *testing.M) {
	virtual = false
	if script := os.Getenv(envScript); script != "" {
		if err := child(script); err != nil {
			fmt.Fprintln(os.Stderr, "traced child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

// say makes a mark. RawSyscall: the Go scheduler has no part in it.
func say(kind markKind, a, b uint64) {
	unix.RawSyscall(markCall, uintptr(kind), uintptr(a), uintptr(b))
}

// Kinds of transactions: up to maxSingle, one write of so many bytes;
// several; or one of committer k, whose transactions overlap with nobody's.
const (
	maxSingle        = 1 << 20
	kindSeveral      = maxSingle + 1
	kindBlock        = maxSingle + 2
	kindCommitter    = maxSingle + 16
	committers       = 3
	commitsEach      = 2
	commitsSize      = 200
	firstShared      = 100 // block of the first committer
	large            = 140 << 10
	killedInTx       = 60 // bytes: a segment of three lines
	fillSize         = 60 << 10
	beforeRingsEnd   = 9000
	checkpointWithin = 20 * time.Second
)

type write struct {
	off  int64
	data []byte
}

// pool is what transactions write: made before tracing begins.
var pool = func() []byte {
	p := make([]byte, 1<<20)
	rng := rand.New(rand.NewPCG(20261122, 0))
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], rng.Uint64())
	}
	return p
}()

// transaction is the i-th, of a kind: the child and its parent agree on it.
func transaction(i, kind uint64) []write {
	at := int(i * 4099 % (512 << 10))
	fill := func(off int64, n int) write {
		p := pool[at : at+n : at+n]
		at += n
		return write{off, p}
	}
	switch {
	case kind <= maxSingle:
		return []write{fill(int64(i*70001+kind)%(volumeSize-int64(kind)), int(kind))}
	case kind == kindSeveral:
		return []write{fill(5, 10), fill(blockSize-6, 20), fill(20*blockSize+100, 700), fill(30*blockSize, blockSize)}
	case kind == kindBlock:
		return []write{fill(blockSize*int64(i%64), blockSize)}
	default:
		return []write{fill(int64(firstShared+kind-kindCommitter)*blockSize+17, commitsSize)}
	}
}

// worker is the child's work.
type worker struct {
	path string
	v    *nvmmirror.Volume
	mu   sync.Mutex
	next uint64
	kill uint64
}

func child(script string) error {
	var name string
	w := &worker{}
	if _, err := fmt.Sscan(script, &name, &w.path, &choice.flush, &choice.width, &w.next, &w.kill); err != nil {
		return err
	}
	switch name {
	case "long":
		return w.long()
	case "short":
		return w.short(sizes)
	case "brief":
		return w.short(briefSizes)
	case "recover":
		return w.recover(false)
	case "recover-close":
		return w.recover(true)
	}
	return fmt.Errorf("no script %q", name)
}

func (w *worker) open() (err error) {
	w.v, err = nvmmirror.Open(w.path, nvmmirror.Options{})
	return err
}

func (w *worker) commit(kind uint64) (nvmmirror.LSN, error) {
	w.mu.Lock()
	i := w.next
	w.next++
	w.mu.Unlock()
	tx := w.v.Begin()
	for _, wr := range transaction(i, kind) {
		if err := tx.Write(wr.off, wr.data); err != nil {
			return 0, err
		}
	}
	say(markBegin, i, kind)
	lsn, err := tx.Commit(context.Background())
	if err == nil {
		say(markEnd, i, uint64(lsn))
	}
	return lsn, err
}

func (w *worker) commits(kinds ...uint64) error {
	for _, k := range kinds {
		if _, err := w.commit(k); err != nil {
			return fmt.Errorf("commit of kind %d: %w", k, err)
		}
	}
	return nil
}

// long does everything there is, and ends killed.
func (w *worker) long() error {
	say(markOn, 0, 0)
	err := w.steps(w.create, w.open, func() error { return w.commits(sizes...) },
		func() error { return w.commits(large) }, w.checkpoint,
		func() error { return w.commits(100, 2000) }, w.group, w.close)
	say(markOff, 0, 0)
	if err != nil {
		return err
	}
	if err := w.steps(w.open, w.toRingsEnd, w.close); err != nil {
		return err
	}
	say(markOn, 0, 0)
	return w.steps(w.open, func() error { return w.commits(5000, 5000, 64) }, w.metadata, w.die)
}

// short is what the other choices do, across the ring's end.
func (w *worker) short(kinds []uint64) error {
	if err := w.steps(w.create, w.open, w.toRingsEnd, w.close); err != nil {
		return err
	}
	say(markOn, 0, 0)
	return w.steps(w.open, func() error { return w.commits(kinds...) }, w.die)
}

// recover opens what a killed process left. closed: the close is traced too.
func (w *worker) recover(closed bool) error {
	say(markOn, 0, 0)
	err := w.steps(w.open,
		func() error { say(markOpened, 0, 0); return nil },
		func() error { return w.commits(100, 5000) })
	if closed && err == nil {
		err = w.close()
	}
	say(markOff, 0, 0)
	return err
}

func (w *worker) steps(fs ...func() error) error {
	for _, f := range fs {
		if err := f(); err != nil {
			return err
		}
	}
	return nil
}

func (w *worker) create() error {
	err := nvmmirror.Create(w.path, nvmmirror.CreateOptions{Size: volumeSize, JournalSize: nvmmirror.MinJournal, Accept: pmem.Emulated})
	say(markCreated, 0, 0)
	return err
}

func (w *worker) close() error { return w.v.Close() }

// toRingsEnd commits until the next transactions wrap around.
func (w *worker) toRingsEnd() error {
	for {
		lsn, err := w.commit(fillSize)
		if err != nil {
			return err
		}
		if left := nvmmirror.MinJournal - int64(lsn); left < fillSize+beforeRingsEnd {
			return w.commits(uint64(left - beforeRingsEnd))
		}
	}
}

// metadata changes the metadata, and the epoch with it.
func (w *worker) metadata() error {
	if err := w.v.Demote(context.Background()); err != nil {
		return err
	}
	return w.v.Promote(context.Background(), true)
}

// die commits, and is killed at it.
func (w *worker) die() error {
	if err := w.commits(100); err != nil {
		return err
	}
	say(markKill, w.kill, 0)
	if err := w.commits(killedInTx); err != nil {
		return err
	}
	return errors.New("the parent should have killed this process")
}

// sizes are the standard kinds of commit.
var sizes = []uint64{1, 8, 64, 100, 255, 256, 300, 1000, kindBlock, 5000, 9000, kindSeveral}

// briefSizes are those at which the way of the bytes changes: whole in the
// cache, just below and just above where non-temporal stores begin, with lines
// in part before and behind them, more than is left of the ring, over blocks.
var briefSizes = []uint64{8, 255, 256, 1000, 9000, kindSeveral}

// checkpoint waits for the one that comes when a volume is idle.
func (w *worker) checkpoint() error {
	before := w.v.Status().Counters.Checkpoints
	for deadline := time.Now().Add(checkpointWithin); w.v.Status().Counters.Checkpoints == before; {
		if time.Now().After(deadline) {
			return errors.New("no checkpoint came")
		}
		time.Sleep(400 * time.Millisecond) // each look costs thousands of steps
	}
	return nil
}

// group commits from several goroutines. One that has fenced gives way to the
// next, which so finds a commit under way.
func (w *worker) group() error {
	errs := make(chan error, committers)
	say(markGroup, 1, 0)
	for k := range uint64(committers) {
		go func() {
			for range commitsEach {
				if _, err := w.commit(kindCommitter + k); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	var err error
	for range committers {
		err = errors.Join(err, <-errs)
	}
	say(markGroup, 0, 0)
	return err
}
