package nvmmirror

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// Both were forced to go on without the other, and acknowledged: refused on
// both, for good, and nothing is copied either way. One that is restarted does
// not serve beside the other until it is told to once more.
func TestSplitBrain(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{})
	b.wire.link.set(true)
	a.peerIs("lost")
	b.peerIs("lost")
	if err := a.ContinueAlone(context.Background(), true); err != nil {
		t.Fatal(err)
	}
	b.promote(true)
	commit(t, a, 0, []byte("a's own"))
	commit(t, b, 0, []byte("b's own"))
	b.wire.link.set(false)
	again := func(n *testNode) {
		n.open()
		if n.peerIs("refused"); n.Status().Serving {
			t.Fatalf("%s serves again beside another primary", n.name)
		}
		refused(t, "continue-alone beside another primary", n.ContinueAlone(context.Background(), false))
		if err := n.ContinueAlone(context.Background(), true); err != nil {
			t.Fatal(err)
		}
	}
	for round := range 3 {
		for _, n := range []*testNode{a, b} {
			s := n.peerIs("refused")
			if replicate.Rule(s.Rule) != replicate.RuleSplitBrain || !strings.Contains(s.Reason, "lose") {
				t.Fatalf("round %d: %+v", round, s)
			}
			if got := string(content(t, n)[:7]); got != n.name+"'s own" {
				t.Fatalf("%s now holds %q", n.name, got)
			}
		}
		switch round {
		case 0:
			a.close()
			again(a)
		case 1:
			b.crash()
			again(b)
		}
	}
	// The way out: the loser's region is replaced.
	replace(t, b)
	b.open()
	b.inSync()
	identical(t, a, b)
}

// A primary that is cut off serves no read that another primary's commit has
// made stale.
func TestReadLease(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{quiet: true})
	for round := range 4 {
		old, now := []byte{byte(2*round + 1)}, []byte{byte(2*round + 2)}
		commit(t, a, 0, old)
		var stale atomic.Bool // b has acknowledged something newer
		var after atomic.Int64
		stop := make(chan struct{})
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				p := make([]byte, 1)
				for {
					select {
					case <-stop:
						return
					default:
					}
					was := stale.Load()
					_, err := a.ReadAt(p, 0)
					var not *ErrNotPrimary
					switch {
					case err == nil && was && p[0] != now[0]:
						t.Errorf("read %d after %d was acknowledged by the new primary", p[0], now[0])
						return
					case err == nil:
					case !errors.Is(err, ErrNoLease) && !errors.As(err, &not):
						t.Errorf("read: %v", err)
						return
					case was:
						after.Add(1)
					}
				}
			})
		}
		b.wire.link.set(true)
		// Not waiting for b to notice: the lease alone must hold.
		if err := b.Promote(context.Background(), false); err != nil {
			b.peerIs("lost")
			b.promote(false)
		}
		commit(t, b, 0, now)
		stale.Store(true)
		for deadline := time.Now().Add(5 * time.Second); after.Load() < 100 && !t.Failed(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("no read was refused")
			}
		}
		close(stop)
		wg.Wait()
		b.wire.link.set(false)
		a.inSync()
		b.inSync()
		a, b = b, a
	}
	identical(t, a, b)
}

const childEnv = "NVMMIRROR_TEST_LEASE_CHILD"

// TestLeaseChild is the other process of TestReadLeaseOfAStoppedProcess: a
// primary that reads in a loop and says what it read, and from when on.
func TestLeaseChild(t *testing.T) {
	args := strings.Split(os.Getenv(childEnv), "|")
	if len(args) != 3 {
		t.Skip("only as a child of TestReadLeaseOfAStoppedProcess")
	}
	v, err := Open(args[0], Options{Peer: &Peer{Listen: args[1], Address: args[2], Key: []byte("a key of both"), Timeout: time.Second}})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	lines := make(chan struct{})
	go func() {
		defer close(lines)
		bufio.NewReader(os.Stdin).ReadString('\n')
	}()
	p := make([]byte, 8)
	for reads := 0; ; reads++ {
		select {
		case <-lines:
			return
		default:
		}
		start := bootNanos()
		_, err := v.ReadAt(p, 0)
		switch {
		case err == nil:
			fmt.Printf("read %d %d\n", start, binary.LittleEndian.Uint64(p))
		default:
			fmt.Printf("refused %d\n", start)
			time.Sleep(time.Millisecond)
		}
	}
}

func bootNanos() int64 {
	var ts unix.Timespec
	unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts)
	return ts.Nano()
}

// The same where the old primary is stopped in the middle of what it does, and
// goes on later: it knows nothing of the time that passed.
func TestReadLeaseOfAStoppedProcess(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{bare: true, timeout: time.Second})
	value := make([]byte, 8)
	binary.LittleEndian.PutUint64(value, 1)
	commit(t, a, 0, value)
	a.close()
	cmd := exec.Command(os.Args[0], "-test.run=^TestLeaseChild$")
	cmd.Env = append(os.Environ(), childEnv+"="+a.path+"|"+a.opt.Peer.Listen+"|"+a.opt.Peer.Address)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var committed atomic.Int64 // when b acknowledged a newer value
	var reads, refusals atomic.Int64
	done := make(chan error, 1)
	go func() {
		done <- func() error {
			for sc := bufio.NewScanner(out); sc.Scan(); {
				f := strings.Fields(sc.Text())
				if len(f) < 2 || f[0] != "read" && f[0] != "refused" {
					t.Log("child: ", sc.Text()) // that it failed, perhaps
					continue
				}
				start, _ := strconv.ParseInt(f[1], 10, 64)
				since := committed.Load()
				switch {
				case f[0] == "refused" && since != 0 && start > since:
					refusals.Add(1)
				case f[0] == "read" && len(f) == 3:
					reads.Add(1)
					if since != 0 && start > since && f[2] != "2" {
						return fmt.Errorf("read %s, %v after the new primary acknowledged 2", f[2], time.Duration(start-since))
					}
				}
			}
			return nil
		}()
	}()
	defer func() {
		cmd.Process.Signal(syscall.SIGCONT)
		stdin.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		cmd.Wait()
	}()
	poll := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("never ", what)
			}
		}
	}
	b.inSync()
	poll("read", func() bool { return reads.Load() > 100 })
	cmd.Process.Signal(syscall.SIGSTOP)
	b.peerIs("lost")
	b.promote(false)
	binary.LittleEndian.PutUint64(value, 2)
	commit(t, b, 0, value)
	committed.Store(bootNanos())
	cmd.Process.Signal(syscall.SIGCONT)
	poll("refused", func() bool { return refusals.Load() > 10 })
	b.inSync()
}

// flipLive flips one bit of a live region.
func flipLive(n *testNode, off int64) {
	n.applyMu.Lock()
	defer n.applyMu.Unlock()
	n.mem.Bytes()[n.data.Off+off] ^= 0x20
}

func TestFlippedBlockOnThePrimary(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{})
	fill(t, a, 13, 30, 20000)
	quiesce(t, a, b)
	want := content(t, a)
	for i, block := range []int64{0, 17, a.Size()/blockSize - 1} {
		flipLive(a, block*blockSize+int64(i)*1000)
		p := make([]byte, 100)
		off := block*blockSize + 2000
		a.read(t, p, off)
		if !bytes.Equal(p, want[off:off+100]) {
			t.Fatalf("block %d: a flipped bit was served", block)
		}
		// Found more than once where the lease was lost in between.
		if c := a.Status().Counters; c.BadBlocks < uint64(i+1) || c.RepairedBlocks != uint64(i+1) {
			t.Fatalf("%+v", c)
		}
	}
	if !bytes.Equal(content(t, a), want) {
		t.Fatal("content differs")
	}
	identical(t, a, b)
}

// A flipped bit in a block that is then changed around it: the change must not
// bless it. On either node.
func TestFlippedBlockThatChanges(t *testing.T) {
	t.Parallel()
	for _, where := range []string{"primary", "secondary"} {
		t.Run(where, func(t *testing.T) {
			a, b := pairInSync(t, testConfig{})
			fill(t, a, 14, 30, 20000)
			quiesce(t, a, b)
			n := a
			if where == "secondary" {
				n = b
			}
			for _, m := range []*testNode{a, b} { // the next change is the first after a checkpoint
				if err := m.checkpoint(false); err != nil {
					t.Fatal(err)
				}
			}
			want := content(t, a)
			flipLive(n, 5*blockSize+100)
			commit(t, a, 5*blockSize+50, []byte("beside"))
			copy(want[5*blockSize+50:], "beside")
			if where == "primary" {
				if !bytes.Equal(content(t, a), want) {
					t.Fatal("a flipped bit was served")
				}
			}
			n.until("repaired", func(s Status) bool { return s.Counters.RepairedBlocks == 1 && s.Counters.BadBlocks == 1 })
			identical(t, a, b)
		})
	}
}

// Without a peer there is nothing to repair from: said so, not served.
func TestFlippedBlockAlone(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Alone}})
	b.close()
	a.until("alone", func(s Status) bool { return s.Peer == "lost" && !a.pair.Required() })
	flipLive(a, 3*blockSize)
	var corrupt *CorruptError
	if _, err := a.ReadAt(make([]byte, 10), 3*blockSize+5); !errors.As(err, &corrupt) {
		t.Fatalf("read of a damaged block: %v", err)
	}
	a.read(t, make([]byte, 10), 4*blockSize)
	b.open()
	b.inSync()
	a.inSync() // it hears of it later
	a.read(t, make([]byte, 10), 3*blockSize+5)
	identical(t, a, b)
}

// A bit of a copied block flips on an unsigned wire.
func TestCorruptedFullCopy(t *testing.T) {
	t.Parallel()
	a, b := newPair(t, testConfig{plain: true, opt: Options{OnPeerLoss: Alone}})
	a.promote(false)
	a.inSync()
	b.close()
	if err := os.Remove(b.path); err != nil {
		t.Fatal(err)
	}
	a.until("alone", func(s Status) bool { return s.Peer == "lost" && !a.pair.Required() })
	fill(t, a, 15, 500, 20000)
	marker := bytes.Repeat([]byte("found"), 50)
	commit(t, a, 3<<20, marker)
	a.wire.setCorrupt(func(out []byte) int {
		i := bytes.Index(out, marker)
		if i >= 0 {
			out[i+10] ^= 1
			i += 10
		}
		return i
	})
	if err := Create(b.path, CreateOptions{Size: a.Size(), JournalSize: a.ring.Len, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
	b.open()
	b.inSync()
	if _, _, left := a.wire.faults(); left != nil {
		t.Fatal("nothing was corrupted")
	}
	if b.Status().Counters.CRCFailures == 0 {
		t.Error("not counted")
	}
	identical(t, a, b)
}
