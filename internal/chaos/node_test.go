package chaos

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/internal/admin"
	"github.com/nvmmirror/nvmmirror/internal/faultwire"
)

const (
	upTime   = 20 * time.Second // for a daemon to come up, or to end
	syncTime = 30 * time.Second // for a healed pair to be in sync
)

// starter starts processes inside a namespace, all from one thread that lasts
// as long as this process or until close: so the kernel can end them with it,
// after a kill -9 of this process too. It looks at the thread that forked.
type starter struct {
	commands chan *exec.Cmd
	answers  chan error
	ended    chan error
}

func newStarter(h *faultwire.Host) *starter {
	s := &starter{commands: make(chan *exec.Cmd), answers: make(chan error), ended: make(chan error, 1)}
	go func() {
		s.ended <- h.Do(func() error {
			for c := range s.commands {
				s.answers <- c.Start()
			}
			return nil
		})
	}()
	return s
}

func (s *starter) start(c *exec.Cmd) error {
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Pdeathsig: syscall.SIGKILL}
	s.commands <- c
	return <-s.answers
}

func (s *starter) close() error {
	close(s.commands)
	return <-s.ended
}

// node is one daemon with its files. It belongs to the test's goroutine, but
// for admin.
type node struct {
	t                           *testing.T
	name                        string
	host                        *faultwire.Host
	starter                     *starter
	fs                          *tmpfs // of all its files
	config, region, socket, log string
	admin                       *admin.Client

	cmd     *exec.Cmd
	done    chan struct{} // closed when the process has ended
	stopped bool          // by SIGSTOP
}

// port is the daemons': each has a namespace to itself.
const port = 7447

// pairConfig describes a pair.
type pairConfig struct {
	policy        nvmmirror.OnPeerLoss
	timeout       time.Duration
	size, journal int64
	transport     string // "": md5sig
	seed          uint64
}

// pair is two daemons and the wire between them.
type pair struct {
	t    *testing.T
	wire *faultwire.Wire
	dir  string // where the test's own files are
	a, b *node
}

// newPair makes a pair in sync, with a as primary.
func newPair(t *testing.T, c pairConfig) *pair {
	t.Helper()
	w := needWire(t, c.seed)
	space := nodeSpace + c.size + c.journal
	fa, fb := newTmpfs(t, space), newTmpfs(t, space)
	p := &pair{t: t, wire: w, dir: workDir(t, fa.dir, fb.dir)}
	p.a, p.b = p.newNode("a", w.A, fa, c), p.newNode("b", w.B, fb, c)
	p.a.configure(w.B.Addr, p.transportLines(p.a, p.b, c), c)
	p.b.configure(w.A.Addr, p.transportLines(p.b, p.a, c), c)
	for _, n := range []*node{p.a, p.b} {
		out, err := exec.Command(program, "create", n.region, "--emulate", "--size", fmt.Sprint(c.size), "--journal-size", fmt.Sprint(c.journal)).CombinedOutput()
		if err != nil {
			t.Fatalf("create: %v: %s", err, out)
		}
		n.start()
	}
	if _, err := p.a.admin.Promote(t.Context(), false); err != nil {
		t.Fatalf("the first promotion: %v", err)
	}
	p.inSync()
	return p
}

// workDir is a directory for histories. Where the test fails, they and the
// small files in the other directories are kept in one whose name is printed.
func workDir(t *testing.T, others ...string) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "nvmmirror-chaos-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			keep(t, append(others, dir))
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// keep copies logs and histories to a directory that stays.
func keep(t *testing.T, dirs []string) {
	kept, err := os.MkdirTemp("", "nvmmirror-chaos-failed-")
	if err != nil {
		t.Error(err)
		return
	}
	t.Logf("logs and history are kept in %s", kept)
	for _, dir := range dirs {
		for _, pattern := range []string{"*.log", "*.html", "*.toml"} {
			files, _ := filepath.Glob(filepath.Join(dir, pattern)) // the patterns are sound
			for _, f := range files {
				b, err := os.ReadFile(f)
				if err == nil {
					err = os.WriteFile(filepath.Join(kept, filepath.Base(f)), b, 0o600)
				}
				if err != nil {
					t.Error(err)
				}
			}
		}
	}
	if _, err := os.Stat(filepath.Join(kept, historyPage)); err == nil {
		t.Logf("the history as a picture, for a browser: %s", filepath.Join(kept, historyPage))
	}
}

func (p *pair) newNode(name string, h *faultwire.Host, fs *tmpfs, c pairConfig) *node {
	file := func(ext string) string { return filepath.Join(fs.dir, name+ext) }
	n := &node{
		t: p.t, name: name, host: h, starter: newStarter(h), fs: fs,
		config: file(".toml"), region: file(".nvm"), socket: file(".sock"), log: file(".log"),
	}
	n.admin = admin.NewClient(n.socket)
	p.t.Cleanup(func() {
		n.end()
		n.admin.Close()
		if err := n.starter.close(); err != nil {
			p.t.Error(err)
		}
	})
	return n
}

func (n *node) configure(peer netip.Addr, transport string, c pairConfig) {
	n.t.Helper()
	text := fmt.Sprintf(`region = %q
ack = "both"
on_peer_loss = %q
[peer]
listen = "%v:%d"
address = "%v:%d"
%s
timeout = %q
[admin]
socket = %q
`, n.region, c.policy, n.host.Addr, port, peer, port, transport, c.timeout.String(), n.socket)
	if err := os.WriteFile(n.config, []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// launch starts the process and does not wait for it to answer.
func (n *node) launch() {
	n.t.Helper()
	log, err := os.OpenFile(n.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.Command(program, "serve", "--config", n.config)
	cmd.Stdout, cmd.Stderr = log, log
	if err := n.starter.start(cmd); err != nil {
		n.t.Fatalf("start %s: %v", n.name, err)
	}
	done := make(chan struct{})
	n.cmd, n.done, n.stopped = cmd, done, false
	go func() {
		defer close(done)
		cmd.Wait() // how it ended is in ProcessState
	}()
}

// start starts the daemon and waits until it answers.
func (n *node) start() {
	n.t.Helper()
	n.launch()
	n.answers()
}

func (n *node) answers() {
	n.t.Helper()
	poll(n.t, upTime, n.name+" answers", func() (bool, string) {
		n.alive()
		ctx, cancel := context.WithTimeout(n.t.Context(), time.Second)
		defer cancel()
		_, err := n.admin.Status(ctx)
		return err == nil, fmt.Sprint(err)
	})
}

func (n *node) running() bool {
	if n.cmd == nil {
		return false
	}
	select {
	case <-n.done:
		return false
	default:
		return true
	}
}

// alive fails the test where the daemon has ended by itself.
func (n *node) alive() {
	n.t.Helper()
	if !n.running() {
		n.t.Fatalf("%s ended by itself: %v: %s", n.name, n.cmd.ProcessState, n.lastLines())
	}
}

func (n *node) signal(s syscall.Signal) {
	n.t.Helper()
	n.alive()
	if err := n.cmd.Process.Signal(s); err != nil {
		n.t.Fatalf("%v to %s: %v", s, n.name, err)
	}
	n.stopped = s == unix.SIGSTOP || n.stopped && s != unix.SIGCONT
}

// kill is kill -9, and the process's end.
func (n *node) kill() {
	n.t.Helper()
	n.signal(unix.SIGKILL)
	<-n.done
	n.stopped = false
	n.admin.Close()
}

// stop stops the daemon cleanly.
func (n *node) stop() {
	n.t.Helper()
	n.signal(unix.SIGTERM)
	select {
	case <-n.done:
	case <-time.After(upTime):
		n.t.Fatalf("%s does not end within %v of SIGTERM", n.name, upTime)
	}
	if !n.cmd.ProcessState.Success() {
		n.t.Fatalf("%s stopped with %v: %s", n.name, n.cmd.ProcessState, n.lastLines())
	}
}

// end ends the process whatever it does.
func (n *node) end() {
	if n.running() {
		n.cmd.Process.Kill() // it may just have ended
		<-n.done
	}
}

func (n *node) lastLines() string {
	b, err := os.ReadFile(n.log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-5):], "\n")
}

func (n *node) status() admin.Status {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), upTime)
	defer cancel()
	s, err := n.admin.Status(ctx)
	if err != nil {
		n.t.Fatalf("status of %s: %v", n.name, err)
	}
	return s
}

// await waits until the daemon's status is as wanted.
func (n *node) await(what string, ok func(admin.Status) bool) admin.Status {
	n.t.Helper()
	var s admin.Status
	poll(n.t, syncTime, n.name+": "+what, func() (bool, string) {
		n.alive()
		s = n.status()
		return ok(s), fmt.Sprintf("%s, peer %s (%s, rule %s), epoch %v, title %v, committed %d, applied %d",
			s.Role, s.Peer, s.Reason, s.Rule, s.Epoch, s.Title, s.Committed, s.Applied)
	})
	return s
}

// inSync waits until both nodes say that they are, and returns the primary and
// the secondary.
func (p *pair) inSync() (primary, secondary *node) {
	p.t.Helper()
	for _, n := range []*node{p.a, p.b} {
		n.await("in sync", func(s admin.Status) bool {
			if s.Peer == "refused" {
				p.t.Fatalf("%s refuses its peer: %s", n.name, s.Reason)
			}
			return s.Peer == "in-sync"
		})
	}
	if p.a.status().Role == "primary" {
		return p.a, p.b
	}
	return p.b, p.a
}

// settle waits until both nodes have applied the same log.
func (p *pair) settle() {
	p.t.Helper()
	primary, secondary := p.inSync()
	end := primary.status().Committed
	for _, n := range []*node{primary, secondary} {
		n.await(fmt.Sprintf("the log up to %d applied", end), func(s admin.Status) bool { return s.Committed == end && s.Applied == end })
	}
}
