package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/internal/admin"
	"github.com/nvmmirror/nvmmirror/internal/loopback"
)

// program is the built binary: the tests run it as a user would.
var program string

func TestMain(m *testing.M) { os.Exit(testMain(m)) }

func testMain(m *testing.M) int {
	dir, err := os.MkdirTemp("", "nvmmirrord-test-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	// Another user runs it in one test.
	if err := os.Chmod(dir, 0o755); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	program = filepath.Join(dir, "nvmmirrord")
	args := []string{"build", "-o", program}
	if raceDetector {
		args = append(args, "-race")
		// Each command would sleep for a second before it exits.
		os.Setenv("GORACE", "atexit_sleep_ms=0 "+os.Getenv("GORACE"))
	}
	build := exec.Command("go", append(args, ".")...)
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "%v: %v\n%s", build, err, out)
		return 1
	}
	return m.Run()
}

const (
	commandTime = 60 * time.Second // for a command that must end by itself
	stateTime   = 20 * time.Second // for a state to come about
)

// result is what a command left.
type result struct {
	code           int
	stdout, stderr string
}

// command runs the program to its end.
func command(t testing.TB, stdin io.Reader, args ...string) result {
	t.Helper()
	var out bytes.Buffer
	r := commandTo(t, &out, stdin, args...)
	r.stdout = out.String()
	return r
}

// commandTo is command with a standard output of the caller's.
func commandTo(t testing.TB, stdout io.Writer, stdin io.Reader, args ...string) result {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), commandTime)
	defer cancel()
	c := exec.CommandContext(ctx, program, args...)
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c.Stdin = stdin
	var errs bytes.Buffer
	c.Stdout, c.Stderr = stdout, &errs
	err := c.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%v: %v", args, err)
	}
	if ctx.Err() != nil {
		t.Fatalf("%v: did not end: %v%s", args, stdout, errs.String())
	}
	return result{code: c.ProcessState.ExitCode(), stderr: errs.String()}
}

// must runs a command that has to succeed, and returns what it printed.
func must(t testing.TB, args ...string) string {
	t.Helper()
	r := command(t, nil, args...)
	if r.code != exitDone {
		t.Fatalf("%v: exit %d: %s%s", args, r.code, r.stdout, r.stderr)
	}
	return r.stdout
}

// fails runs a command that has to fail with a code, and a message of one
// line that holds all of want.
func fails(t testing.TB, code int, args []string, want ...string) result {
	t.Helper()
	r := command(t, nil, args...)
	check(t, r, code, args, want...)
	return r
}

func check(t testing.TB, r result, code int, args []string, want ...string) {
	t.Helper()
	if r.code != code {
		t.Errorf("%v: exit %d, not %d: %s%s", args, r.code, code, r.stdout, r.stderr)
	}
	message := strings.TrimSuffix(r.stderr, "\n")
	if i := strings.LastIndex(message, "\nSee: "); i >= 0 {
		message = message[:i]
	}
	message = message[strings.LastIndexByte(message, '\n')+1:]
	for _, w := range append(want, "nvmmirrord: ") {
		if !strings.Contains(message, w) {
			t.Errorf("%v: no %q in the message %q", args, w, message)
		}
	}
}

// directory is one for emulated regions.
func directory(t testing.TB) string {
	t.Helper()
	d, err := os.MkdirTemp("/dev/shm", "nvmmirror-test-")
	if err != nil {
		t.Skip("needs /dev/shm: ", err)
	}
	t.Cleanup(func() { os.RemoveAll(d) })
	return d
}

// node is a daemon under test, with its files.
type node struct {
	t                            testing.TB
	name, config, region, socket string

	cmd  *exec.Cmd
	log  *logFile
	done chan struct{}
}

// logFile is a daemon's standard error.
type logFile struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logFile) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logFile) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// start runs the daemon. extra is added to its environment.
func (n *node) start(extra ...string) {
	n.t.Helper()
	n.log, n.done = &logFile{}, make(chan struct{})
	n.cmd = exec.Command(program, "serve", "--config", n.config)
	n.cmd.Stderr = n.log
	n.cmd.Env = append(os.Environ(), extra...)
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := n.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	cmd, done := n.cmd, n.done
	go func() { cmd.Wait(); close(done) }()
	n.eventually("answering", func() bool {
		select {
		case <-done:
			n.t.Fatalf("%s ended: %s", n.name, n.log)
		default:
		}
		c := admin.NewClient(n.socket)
		defer c.Close()
		_, err := c.Status(n.t.Context())
		return err == nil
	})
}

// cleanup ends a daemon that still runs, and shows its log where the test
// failed.
func (n *node) cleanup() {
	if n.cmd == nil {
		return
	}
	n.kill()
	if n.t.Failed() {
		n.t.Logf("log of %s:\n%s", n.name, n.log)
	}
}

func (n *node) kill() {
	n.cmd.Process.Kill()
	<-n.done
}

// stop ends the daemon cleanly and returns its exit code.
func (n *node) stop(sig os.Signal) int {
	n.t.Helper()
	if err := n.cmd.Process.Signal(sig); err != nil {
		n.t.Fatal(err)
	}
	select {
	case <-n.done:
	case <-time.After(stateTime):
		n.t.Fatalf("%s does not stop: %s", n.name, n.log)
	}
	return n.cmd.ProcessState.ExitCode()
}

func (n *node) eventually(what string, ok func() bool) {
	n.t.Helper()
	deadline := time.Now().Add(stateTime)
	for !ok() {
		if time.Now().After(deadline) {
			n.t.Fatalf("%s: not %s in %v:\n%s", n.name, what, stateTime, n.log)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func (n *node) args(args ...string) []string {
	return append(args, "--socket", n.socket)
}

// must is a command to this node's daemon that has to succeed.
func (n *node) must(args ...string) string {
	n.t.Helper()
	return must(n.t, n.args(args...)...)
}

// fails is a command to this node's daemon that has to fail.
func (n *node) fails(code int, args []string, want ...string) {
	n.t.Helper()
	fails(n.t, code, n.args(args...), want...)
}

func (n *node) status() (s admin.Status) {
	n.t.Helper()
	if err := json.Unmarshal([]byte(n.must("status", "-o", "json")), &s); err != nil {
		n.t.Fatal(err)
	}
	return s
}

// now is the status, without a command: for polling.
func (n *node) now() admin.Status {
	n.t.Helper()
	c := admin.NewClient(n.socket)
	defer c.Close()
	s, err := c.Status(n.t.Context())
	if err != nil {
		n.t.Fatalf("%s: %v", n.name, err)
	}
	return s
}

func (n *node) write(offset int, p []byte, args ...string) result {
	n.t.Helper()
	return command(n.t, bytes.NewReader(p), n.args(append([]string{"write", "--offset", fmt.Sprint(offset)}, args...)...)...)
}

func (n *node) read(offset, length int) []byte {
	n.t.Helper()
	return []byte(n.must("read", "--offset", fmt.Sprint(offset), "--length", fmt.Sprint(length)))
}

const regionSize = 4 << 20

// newNode makes a node's region and configuration; peer is its [peer] table.
func newNode(t testing.TB, dir, name, top, peer string) *node {
	t.Helper()
	file := func(ext string) string { return filepath.Join(dir, name+ext) }
	n := &node{t: t, name: name, config: file(".toml"), region: file(".nvm"), socket: file(".sock")}
	must(t, "create", n.region, "--size", "4MiB", "--journal-size", "2MiB", "--emulate")
	text := fmt.Sprintf("region = %q\n%s\n%s\n[admin]\nsocket = %q\n", n.region, top, peer, n.socket)
	if err := os.WriteFile(n.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.cleanup)
	return n
}

// pairOf makes two nodes that are each other's peer, not started. keys are
// those of each.
func pairOf(t testing.TB, top, timeout string, keys [2]string) (a, b *node) {
	t.Helper()
	dir := directory(t)
	addr := [2]string{loopback.AddrPort(t).String(), loopback.AddrPort(t).String()}
	var nodes [2]*node
	for i, name := range []string{"a", "b"} {
		key := filepath.Join(dir, name+".key")
		if err := os.WriteFile(key, []byte(keys[i]+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		peer := fmt.Sprintf("[peer]\nlisten = %q\naddress = %q\nkey_file = %q\ntimeout = %q\n", addr[i], addr[1-i], key, timeout)
		nodes[i] = newNode(t, dir, name, top, peer)
	}
	return nodes[0], nodes[1]
}

var sameKey = [2]string{"a-key-of-both", "a-key-of-both"}

// inSync starts a pair and makes a its primary.
func inSync(t testing.TB, top string) (a, b *node) {
	t.Helper()
	a, b = pairOf(t, top, "500ms", sameKey)
	a.start()
	b.start()
	a.must("promote")
	for _, n := range []*node{a, b} {
		n.must("wait", "--for", "in-sync", "--timeout", "20s")
	}
	return a, b
}
