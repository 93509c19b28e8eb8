package nvmmirror

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror/pmem"
)

// A volume under kill -9. A child process commits transactions and writes a
// byte to a pipe for each one that is acknowledged; the parent kills it at a
// random count, and compares what recovery makes of the region with a model.
//
// The volume has four stripes, each with a sequence of transactions that
// follows from the seed alone: so parent and child agree on them without a
// word. A child has one goroutine for all stripes, or one for each.
const (
	crashStripes = 4
	crashSize    = 1 << 20
	crashStripe  = crashSize / crashStripes
	crashEnv     = "NVMMIRROR_CRASH_CHILD"
)

// crashTransaction is transaction i of a stripe: 1 to 8 writes of 1 B to
// 20 KiB.
func crashTransaction(seed uint64, stripe, i int) transaction {
	rng := rand.New(rand.NewPCG(seed, uint64(stripe)<<32|uint64(i)))
	tx := make(transaction, 1+rng.IntN(8))
	for k := range tx {
		n := 1 + rng.IntN(20<<10)
		if rng.IntN(2) == 0 {
			n = 1 + rng.IntN(200)
		}
		fill := byte(rng.Uint32()) | 1
		p := bytes.Repeat([]byte{fill}, n)
		for j := 0; j < n; j += 1 + rng.IntN(64) {
			p[j] = byte(rng.Uint32())
		}
		tx[k] = store{int64(stripe)*crashStripe + rng.Int64N(crashStripe-int64(n)+1), p}
	}
	return tx
}

// The child's part of the test binary.
func init() {
	spec := os.Getenv(crashEnv)
	if spec == "" {
		return
	}
	if err := crashChild(spec); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

type crashSpec struct {
	path     string
	seed     uint64
	parallel bool
	next     [crashStripes]int // transaction of each stripe
}

func (s crashSpec) String() string {
	return fmt.Sprintf("%d %t %d %d %d %d %s", s.seed, s.parallel, s.next[0], s.next[1], s.next[2], s.next[3], s.path)
}

// crashChild commits until it is killed.
func crashChild(text string) error {
	var s crashSpec
	if _, err := fmt.Sscanf(text, "%d %t %d %d %d %d %s", &s.seed, &s.parallel, &s.next[0], &s.next[1], &s.next[2], &s.next[3], &s.path); err != nil {
		return err
	}
	acks := os.NewFile(3, "acks")
	v, err := Open(s.path, Options{})
	if err != nil {
		return err
	}
	one := func(stripe int) error {
		tx := crashTransaction(s.seed, stripe, s.next[stripe])
		if _, err := tx.commit(v); err != nil {
			return err
		}
		s.next[stripe]++
		_, err := acks.Write([]byte{byte(stripe)})
		return err
	}
	if !s.parallel {
		for i := 0; ; i++ {
			if err := one(i % crashStripes); err != nil {
				return err
			}
		}
	}
	failed := make(chan error)
	for stripe := range crashStripes {
		go func() {
			for {
				if err := one(stripe); err != nil {
					failed <- err
					return
				}
			}
		}()
	}
	return <-failed
}

// crashRig is one region under test, with its model.
type crashRig struct {
	t     *testing.T
	spec  crashSpec
	model []byte // what is committed at least: spec.next transactions
	image []byte // of the region's file; reused
	rng   *rand.Rand

	kills, acks, unacked, torn int
}

func newCrashRig(t *testing.T, dir string, seed uint64) *crashRig {
	r := &crashRig{t: t, model: make([]byte, crashSize), rng: rand.New(rand.NewPCG(seed, 1))}
	r.spec.seed, r.spec.path = seed, filepath.Join(dir, fmt.Sprintf("region-%d", seed))
	if err := Create(r.spec.path, CreateOptions{Size: crashSize, JournalSize: MinJournal, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
	return r
}

// run runs a child and kills it after so many acknowledgements, or, for 0, at
// some moment of its start. It returns how many of each stripe were
// acknowledged.
func (r *crashRig) run(target int) (acked [crashStripes]int, err error) {
	pr, pw, err := os.Pipe()
	if err != nil {
		return acked, err
	}
	defer pr.Close()
	var stderr bytes.Buffer
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), crashEnv+"="+r.spec.String(), "GOMAXPROCS=2")
	cmd.ExtraFiles = []*os.File{pw}
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		pw.Close()
		if errors.Is(err, syscall.ENOEXEC) { // qemu-user without binfmt_misc
			r.t.Skip("needs to start itself as a second process: ", err)
		}
		return acked, err
	}
	pw.Close()
	if target == 0 {
		late := time.AfterFunc(time.Duration(r.rng.IntN(12000))*time.Microsecond, func() { cmd.Process.Kill() })
		defer late.Stop()
	}
	buf := make([]byte, 512)
	for total, killed := 0, false; ; {
		n, err := pr.Read(buf)
		for _, stripe := range buf[:n] {
			acked[stripe]++
		}
		total += n
		if total >= target && target > 0 && !killed {
			killed = true
			cmd.Process.Kill()
		}
		if err == io.EOF {
			break
		}
		if err != nil {
			return acked, err
		}
	}
	cmd.Wait()
	if stderr.Len() > 0 {
		return acked, fmt.Errorf("child: %s", stderr.Bytes())
	}
	return acked, nil
}

// nice is for a process that has work for a whole processor and waits for
// nobody: the tests beside it, which do wait, get three quarters of one that both
// want. What else keeps the machine busy must not starve it, as at 19.
func nice(cmd *exec.Cmd) {
	// Its first thread, from which those to come have it. Not before it started:
	// until it runs its program it holds what is open here.
	_ = unix.Setpriority(unix.PRIO_PROCESS, cmd.Process.Pid, 5)
}

// readImage reads the parts of the file that hold something.
func (r *crashRig) readImage() error {
	f, err := os.Open(r.spec.path)
	if err != nil {
		return err
	}
	defer f.Close()
	m := layout(crashSize, MinJournal)
	if r.image == nil {
		r.image = make([]byte, m.Data.end())
	}
	for _, e := range []extent{{0, metaMax}, {metaArea, metaMax}, m.Journal, {m.Table.Off, crashSize / blockSize * tableEntry}, {m.Data.Off, crashSize}} {
		if _, err := f.ReadAt(r.image[e.Off:e.end()], e.Off); err != nil {
			return err
		}
	}
	return nil
}

// verify compares what recovery makes of the killed child's region with the
// model, and moves the model on.
func (r *crashRig) verify(acked [crashStripes]int) error {
	if err := r.readImage(); err != nil {
		return err
	}
	report, err := Check(r.spec.path)
	if err != nil || report.Damaged {
		return fmt.Errorf("check after a crash: %v, %+v", err, report)
	}
	if report.Recovery.Ending == EndTorn {
		r.torn++
	}
	v, err := openMemory("image", newHeapMemory(r.image), Options{Logger: nopLogger})
	if err != nil {
		return err
	}
	if v.damage.Load() != nil {
		return errors.New(v.recovery.Damage)
	}
	data, bad := blockContent(v)
	if len(bad) > 0 {
		return fmt.Errorf("%d blocks fail their checksums after recovery", len(bad))
	}
	extra := 0
	for s := range crashStripes {
		for range acked[s] {
			crashTransaction(r.spec.seed, s, r.spec.next[s]).applyTo(r.model)
			r.spec.next[s]++
			r.acks++
		}
		lo, hi := s*crashStripe, (s+1)*crashStripe
		if bytes.Equal(data[lo:hi], r.model[lo:hi]) {
			continue
		}
		// Persistent, and killed before it was acknowledged: all of it, or
		// nothing.
		extra++
		next := slices.Clone(r.model)
		crashTransaction(r.spec.seed, s, r.spec.next[s]).applyTo(next)
		if !bytes.Equal(data[lo:hi], next[lo:hi]) {
			return fmt.Errorf("stripe %d is neither %d nor %d transactions", s, r.spec.next[s], r.spec.next[s]+1)
		}
		r.model = next
		r.spec.next[s]++
		r.unacked++
	}
	if !r.spec.parallel && extra > 1 {
		return fmt.Errorf("%d transactions are there that were not acknowledged, one goroutine can have left one", extra)
	}
	return nil
}

func (r *crashRig) rounds(n int) error {
	for r.kills < n {
		r.spec.parallel = r.rng.IntN(3) == 0
		target := 1 + r.rng.IntN(25)
		if r.rng.IntN(10) == 0 {
			target = 0 // in its recovery, or a little after: on top of the n rounds
		} else {
			r.kills++
		}
		acked, err := r.run(target)
		if err == nil {
			err = r.verify(acked)
		}
		if err == nil && r.rng.IntN(50) == 0 {
			err = r.closeCleanly()
		}
		if err != nil {
			return fmt.Errorf("round %d, seed %d, killed at %d (%v): %w", r.kills, r.spec.seed, target, acked, err)
		}
	}
	return nil
}

// closeCleanly opens the region as a program would, and compares what it
// reads.
func (r *crashRig) closeCleanly() error {
	v, err := Open(r.spec.path, Options{})
	if err != nil {
		return err
	}
	p := make([]byte, crashSize)
	_, err = v.ReadAt(p, 0)
	if err == nil && !bytes.Equal(p, r.model) {
		err = errors.New("what ReadAt returns is not the model")
	}
	return errors.Join(err, v.Close())
}

func TestKill9(t *testing.T) {
	t.Parallel()
	rounds := 1000
	if testing.Short() || raceEnabled {
		rounds = 100
	}
	dir := shm(t)
	seed := uint64(time.Now().UnixNano())
	t.Logf("seeds %d, %d", seed, seed+1)
	start := time.Now()
	var wg sync.WaitGroup
	rigs := []*crashRig{newCrashRig(t, dir, seed), newCrashRig(t, dir, seed+1)}
	errs := make([]error, len(rigs))
	for i, r := range rigs {
		wg.Go(func() { errs[i] = r.rounds(rounds / len(rigs)) })
	}
	wg.Wait()
	for i, r := range rigs {
		if errs[i] != nil {
			t.Error(errs[i])
		}
		t.Logf("%d kills, %d transactions acknowledged, %d more were persistent, %d torn tails", r.kills, r.acks, r.unacked, r.torn)
	}
	t.Logf("%v", time.Since(start).Round(time.Millisecond))
}
