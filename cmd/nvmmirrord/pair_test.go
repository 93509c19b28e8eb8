package main

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/internal/loopback"
)

func random(t testing.TB, n int) []byte {
	t.Helper()
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(rng.Uint32())
	}
	return p
}

func TestPair(t *testing.T) {
	t.Parallel()
	a, b := inSync(t, "")
	sa, sb := a.status(), b.status()
	if sa.Role != "primary" || sa.Title || sb.Role != "secondary" || !sb.Title || sa.Epoch != sb.Epoch || sa.Lineage != sb.Lineage || sa.Ack != "both" {
		t.Errorf("a %+v\nb %+v", sa, sb)
	}
	if !strings.Contains(a.log.String(), `"heartbeat":"100ms","read_lease":"250ms"`) || sa.Daemon.Heartbeat != "100ms" || sa.Daemon.ReadLease != "250ms" {
		t.Errorf("heartbeat and read lease are not printed: %+v", sa.Daemon)
	}
	data := random(t, 1<<20)
	r := a.write(512, data, "--chunk", "100KiB")
	if r.code != exitDone {
		t.Fatalf("%+v", r)
	}
	lsn, err := strconv.ParseUint(strings.TrimSpace(r.stdout), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	if sb := b.status(); uint64(sb.Committed) < lsn {
		t.Errorf("acknowledged up to %d, the peer holds it to %v", lsn, sb.Committed)
	}
	if !bytes.Equal(a.read(512, len(data)), data) {
		t.Error("what was read is not what was written")
	}
	// Both are refused on a secondary, which names the primary.
	b.fails(exitFailed, []string{"read", "--offset", "0", "--length", "1"}, "this node is a secondary; the primary is "+loopback.Addr.String())
	check(t, b.write(0, []byte("x")), exitFailed, []string{"write"}, "this node is a secondary; the primary is "+loopback.Addr.String())
	check(t, b.write(0, nil), exitFailed, []string{"write"}, "standard input was empty", "this node is a secondary")
	b.fails(exitRefused, []string{"promote"}, "refused: ")
	b.fails(exitFailed, []string{"continue-alone"}, "only a primary")
	a.fails(exitRefused, []string{"continue-alone"}, "refused: ")

	// A planned switch-over.
	if out := a.must("demote"); !strings.Contains(out, "secondary, ") || strings.Contains(out, "lost") {
		t.Errorf("%s", out)
	}
	b.must("wait", "--for", "connected", "--timeout", "20s")
	b.eventually("with the title", func() bool { return b.now().Title })
	b.must("promote")
	b.must("wait", "--for", "in-sync", "--timeout", "20s")
	if !bytes.Equal(b.read(512, len(data)), data) {
		t.Error("the new primary has other data")
	}
	if r := b.write(0, []byte("after the switch")); r.code != exitDone {
		t.Errorf("%+v", r)
	}
	a.fails(exitFailed, []string{"read", "--offset", "0", "--length", "1"}, "this node is a secondary; the primary is "+loopback.Addr.String())
	for _, n := range []*node{a, b} {
		if code := n.stop(syscall.SIGTERM); code != exitDone {
			t.Errorf("%s: exit %d", n.name, code)
		}
		n.cmd = nil
	}
	if out := must(t, "check", a.region); !strings.Contains(out, "sound") {
		t.Errorf("%s", out)
	}
	for _, n := range []*node{a, b} {
		n.start()
		if !n.status().Recovery.Clean {
			t.Errorf("%s was not closed cleanly", n.name)
		}
	}
	b.must("wait", "--for", "in-sync", "--timeout", "20s")
	if got := b.read(0, 16); string(got) != "after the switch" {
		t.Errorf("%q", got)
	}
}

// What makes a primary go on that waits for its peer is not promote.
func TestPromoteOfAWaitingPrimary(t *testing.T) {
	t.Parallel()
	a, b := inSync(t, "")
	if r := a.write(0, []byte("x")); r.code != exitDone {
		t.Fatalf("%+v", r)
	}
	acked := a.status().Acked
	for _, n := range []*node{b, a} {
		if code := n.stop(syscall.SIGTERM); code != exitDone {
			t.Errorf("%s: exit %d", n.name, code)
		}
		n.cmd = nil
	}
	a.start()
	a.fails(exitRefused, []string{"promote"}, "it was the primary before", "continue-alone")
	if got := a.status().Acked; got != acked {
		t.Errorf("restarted, it says %d of what was acknowledged, not %d", got, acked)
	}
	a.must("continue-alone", "--force")
	a.must("promote")
	// And one that has lost its peer while it served.
	b.start()
	a.must("wait", "--for", "in-sync", "--timeout", "20s")
	b.kill()
	a.eventually("waiting", func() bool { return a.now().Waiting })
	a.fails(exitRefused, []string{"promote"}, "it was the primary before", "continue-alone")
}

// A writer that runs until the primary is killed; then the survivor, promoted
// by its title, holds all that was acknowledged.
func TestKillPrimary(t *testing.T) {
	t.Parallel()
	a, b := inSync(t, "")
	data := random(t, 3<<20)
	const chunk = 256 // so that the daemon is dead before the input ends
	w := exec.Command(program, a.args("write", "--offset", "0", "--chunk", fmt.Sprint(chunk))...)
	w.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	w.Stdin = bytes.NewReader(data)
	var out, errs bytes.Buffer
	w.Stdout, w.Stderr = &out, &errs
	if err := w.Start(); err != nil {
		t.Fatal(err)
	}
	a.eventually("writing", func() bool { return a.now().Counters.Commits > 100 })
	a.kill()
	<-waited(w)
	r := result{w.ProcessState.ExitCode(), out.String(), errs.String()}
	check(t, r, exitFailed, []string{"write"}, "acknowledged before it: ")
	var at, n, size, lsn int
	_, tail, _ := strings.Cut(r.stderr, "the chunk at offset ")
	fmt.Sscanf(tail, "%d", &at)
	_, tail, _ = strings.Cut(tail, "acknowledged before it: ")
	fmt.Sscanf(tail, "%d transactions of %d bytes, up to LSN %d", &n, &size, &lsn)
	t.Logf("%d transactions acknowledged, LSN %d: %s", n, lsn, r.stderr)
	if n < 100 || size != n*chunk || at != size || r.stdout != fmt.Sprintln(lsn) {
		t.Errorf("%+v", r)
	}
	b.must("promote")
	if s := b.status(); s.Role != "primary" || int(s.Committed) < lsn || int(s.Applied) < lsn {
		t.Errorf("acknowledged up to %d, the survivor has %+v", lsn, s)
	}
	if !bytes.Equal(b.read(0, size), data[:size]) {
		t.Error("the survivor does not hold what was acknowledged")
	}
	if r := b.write(0, []byte("alone")); r.code != exitDone {
		t.Errorf("%+v", r)
	}
	a.start()
	b.must("wait", "--for", "in-sync", "--timeout", "20s")
	if s := a.status(); s.Role != "secondary" {
		t.Errorf("%+v", s)
	}
}

func waited(c *exec.Cmd) <-chan struct{} {
	done := make(chan struct{})
	go func() { c.Wait(); close(done) }() // the process state says how
	return done
}

// Each promotion that the title's rules forbid ends with exit 4.
func TestPromoteRefused(t *testing.T) {
	t.Parallel()
	t.Run("blank and alone", func(t *testing.T) {
		t.Parallel()
		a, _ := pairOf(t, "", "500ms", sameKey)
		a.start()
		start := time.Now()
		a.fails(exitRefused, []string{"promote"}, "this node is blank, and no equally blank peer is connected", "force")
		if d := time.Since(start); d < 9*time.Second || d > 15*time.Second*slowdown {
			t.Errorf("after %v, not 10 s", d)
		}
		a.must("promote", "--force")
		if s := a.status(); s.Role != "primary" {
			t.Errorf("%+v", s)
		}
	})
	t.Run("primary alive", func(t *testing.T) {
		t.Parallel()
		a, b := inSync(t, "")
		b.fails(exitRefused, []string{"promote"}, "the peer is primary and connected; demote it first")
		a.fails(exitRefused, []string{"continue-alone"}, "the peer is in sync; nothing is waiting for it")
	})
	t.Run("the title is the primary's", func(t *testing.T) {
		t.Parallel()
		a, b := inSync(t, `on_peer_loss = "alone"`)
		if !a.status().Title || b.status().Title {
			t.Fatal("the title is not the primary's")
		}
		a.kill()
		b.eventually("lost", func() bool { return b.now().Peer == "lost" })
		b.fails(exitRefused, []string{"promote"}, "does not hold the title", "force")
		b.must("promote", "--force")
	})
	t.Run("the peer went on alone", func(t *testing.T) {
		t.Parallel()
		a, b := inSync(t, "")
		a.kill()
		b.eventually("lost", func() bool { return b.now().Peer == "lost" })
		b.must("promote")
		b.kill()
		a.start()
		// It was primary and does not hold the title: it may neither go on,
		// nor serve.
		a.fails(exitRefused, []string{"continue-alone"}, "does not hold the title")
		a.fails(exitFailed, []string{"read", "--offset", "0", "--length", "1"}, "not read")
		check(t, a.write(0, []byte("x"), "--timeout", "300ms"), exitFailed, []string{"write"}, "was not written")
		a.fails(exitRefused, []string{"demote"}, "refused: ")
	})
}

// With the peer stopped, not dead, a transaction is neither acknowledged nor
// lost: its outcome is unknown.
func TestOutcomeUnknown(t *testing.T) {
	t.Parallel()
	a, b := inSync(t, "")
	if r := a.write(0, []byte("before")); r.code != exitDone {
		t.Fatalf("%+v", r)
	}
	if err := b.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	r := a.write(0, []byte("unknown"), "--timeout", "300ms")
	check(t, r, exitFailed, []string{"write"}, "outcome unknown", "acknowledged before it: 0 transactions of 0 bytes")
	if r.stdout != "" {
		t.Errorf("an LSN was printed: %q", r.stdout)
	}
	a.eventually("lost", func() bool { return a.now().Peer == "lost" })
	a.fails(exitFailed, []string{"read", "--offset", "0", "--length", "1"}, "not read")
	a.fails(exitFailed, []string{"wait", "--for", "in-sync", "--timeout", "100ms"}, "not in-sync within 100ms: the peer is lost")
	a.fails(exitRefused, []string{"continue-alone"}, "does not hold the title")
	if err := b.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	a.must("wait", "--for", "in-sync", "--timeout", "20s")
	if got := a.read(0, 7); string(got) != "unknown" {
		t.Errorf("%q: the peer had it, and it was dropped", got)
	}
}

// Interrupting a write that waits says that its outcome is unknown.
func TestInterruptedWrite(t *testing.T) {
	t.Parallel()
	a, b := inSync(t, "")
	if err := b.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	before := a.status().Committed
	w := exec.Command(program, a.args("write", "--offset", "0")...)
	w.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	w.Stdin = strings.NewReader("x")
	var errs bytes.Buffer
	w.Stderr = &errs
	if err := w.Start(); err != nil {
		t.Fatal(err)
	}
	a.eventually("written", func() bool { return a.now().Committed > before })
	if err := w.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	<-waited(w)
	check(t, result{w.ProcessState.ExitCode(), "", errs.String()}, exitFailed, []string{"write"}, "outcome unknown", "interrupted")
	// The primary stops although a transaction of nobody's waits.
	if code := a.stop(syscall.SIGTERM); code != exitDone {
		t.Errorf("exit %d", code)
	}
}

// The peer's kernel drops what is signed with another key, in silence: within
// 3 s log and status name the counter, whatever the timeout.
func TestWrongKey(t *testing.T) {
	t.Parallel()
	for _, timeout := range []string{"1s", "10s"} {
		t.Run(timeout, func(t *testing.T) {
			t.Parallel()
			a, b := pairOf(t, "", timeout, [2]string{"the-key-of-a", "the-key-of-b"})
			a.start()
			b.start()
			start := time.Now()
			told := func(s string) bool {
				return strings.Contains(s, "kernel counter TCPMD5Failure rose by ") && strings.Contains(s, "check that both nodes' key files are equal")
			}
			for _, n := range []*node{a, b} {
				n.eventually("telling of the key", func() bool { return told(n.now().Reason) && told(n.log.String()) })
				if d := time.Since(start); d > 3*time.Second*slowdown {
					t.Errorf("%s: told after %v", n.name, d)
				}
				if s := n.status(); s.Peer != "lost" || s.Counters.MD5Failures == 0 {
					t.Errorf("%s: %s, %+v", n.name, s.Peer, s.Counters)
				}
			}
			// Not once for each attempt: of other tests' connections the
			// machine's counters rise as well, some at one attempt, some at
			// another.
			a.eventually("dialled again", func() bool { return a.now().Counters.DialFailures >= 4 })
			figures := regexp.MustCompile(`[0-9]+`)
			said := map[string]bool{}
			for _, m := range regexp.MustCompile(`"msg":"peer lost","reason":"(.*)"`).FindAllStringSubmatch(a.log.String(), -1) {
				if reason := figures.ReplaceAllString(m[1], "N"); said[reason] {
					t.Errorf("logged again: %s", reason)
				} else {
					said[reason] = true
				}
			}
			if len(said) == 0 {
				t.Error("no reason in the log")
			}
			a.fails(exitFailed, []string{"wait", "--for", "connected", "--timeout", "50ms"}, "TCPMD5Failure")
		})
	}
}

func TestAsync(t *testing.T) {
	t.Parallel()
	a, b := inSync(t, `ack = "async"`)
	if s := a.status(); s.Ack != "async" || !s.Title {
		t.Errorf("%+v", s)
	}
	b.kill()
	if r := a.write(0, []byte("x"), "--timeout", "10s"); r.code != exitDone {
		t.Errorf("async: a commit waits for a peer that is lost: %+v", r)
	}
}
