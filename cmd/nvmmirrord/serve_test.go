package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestServeStandalone(t *testing.T) {
	t.Parallel()
	n := newNode(t, directory(t), "a", "", "")
	manager := listenNotify(t)
	n.start("NOTIFY_SOCKET=" + manager.path)
	manager.expect(t, "READY=1")
	if info, err := os.Lstat(n.socket); err != nil || info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("socket: %v, %v", info.Mode(), err)
	}
	s := n.status()
	if s.Role != "primary" || s.Peer != "none" || !s.Title || s.Class != "emulated" || s.Recovery.Clean ||
		!slices.ContainsFunc(s.Degraded, func(d string) bool { return strings.HasPrefix(d, "standalone") }) {
		t.Errorf("%+v", s)
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 100_000)
	r := n.write(4096, data, "--chunk", "64KiB")
	s = n.status()
	if r.code != exitDone || r.stdout != s.Acked.String()+"\n" || s.Counters.Commits != uint64((len(data)+65535)/65536) {
		t.Errorf("write: %+v, %d commits, acknowledged %v", r, s.Counters.Commits, s.Acked)
	}
	if !bytes.Equal(n.read(4096, len(data)), data) {
		t.Error("what was read is not what was written")
	}
	n.fails(exitFailed, []string{"wait", "--for", "in-sync"}, "standalone")
	n.fails(exitUsage, []string{"read", "--offset", "4MiB", "--length", "1"}, "beyond the end of the volume, which has 4194304")
	if r := n.write(0, nil); r.code != exitDone || r.stdout != "" {
		t.Errorf("an empty write: %+v", r)
	}
	check(t, n.write(regionSize-65536, make([]byte, 65537), "--chunk", "64KiB"), exitUsage, []string{"write over the end"},
		"the chunk at offset 4194304 was not written", "acknowledged before it: 1 transactions of 65536 bytes, up to LSN ")
	check(t, n.write(0, []byte("x"), "--chunk", "1MiB"), exitUsage, []string{"write"}, "a transaction of this volume holds at most 520192 bytes")

	// The live journal comes through the daemon.
	if out := n.must("journal", "ls", "-o", "json"); !strings.Contains(out, `"stop"`) {
		t.Errorf("journal: %s", out)
	}
	if code := n.stop(syscall.SIGTERM); code != exitDone {
		t.Errorf("SIGTERM: exit %d", code)
	}
	manager.expect(t, "STOPPING=1")
	if _, err := os.Lstat(n.socket); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	n.start()
	if s := n.status(); !s.Recovery.Clean {
		t.Errorf("not closed cleanly: %+v", s.Recovery)
	}
	if text := n.must("status"); !strings.Contains(text, "closed cleanly") || strings.Contains(text, "not closed cleanly") {
		t.Errorf("%s", text)
	}
	if !bytes.Equal(n.read(4096, 4096), data[:4096]) {
		t.Error("the data is not there after a restart")
	}
	if code := n.stop(os.Interrupt); code != exitDone {
		t.Errorf("SIGINT: exit %d", code)
	}
}

// TestServeOutlivesItsTerminal: neither a terminal that hangs up nor a log that
// nobody reads any more ends a node.
func TestServeOutlivesItsTerminal(t *testing.T) {
	t.Parallel()
	n := newNode(t, directory(t), "a", "", "")
	log, stderr, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	n.log, n.done = &logFile{}, make(chan struct{})
	n.cmd = exec.Command(program, "serve", "--config", n.config)
	n.cmd.Stderr = stderr
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := n.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stderr.Close()
	cmd, done := n.cmd, n.done
	go func() { cmd.Wait(); close(done) }()
	lines := bufio.NewReader(log)
	expect := func(want string) {
		t.Helper()
		log.SetReadDeadline(time.Now().Add(stateTime))
		for {
			line, err := lines.ReadString('\n')
			if err != nil {
				t.Fatalf("no %q in the log: %v", want, err)
			}
			if strings.Contains(line, want) {
				return
			}
		}
	}
	expect("ready")
	if err := n.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	expect("SIGHUP is ignored")
	log.Close()
	n.must("promote") // which is logged
	if r := n.write(0, []byte("x")); r.code != exitDone {
		t.Errorf("%+v", r)
	}
	if code := n.stop(syscall.SIGTERM); code != exitDone {
		t.Errorf("exit %d", code)
	}
	n.cmd = nil
	if out := must(t, "info", n.region); strings.Contains(out, "not closed cleanly") {
		t.Errorf("%s", out)
	}
}

// TestCrashIsNoUsageError: Go's own exit code for a panic, or for the SIGQUIT that
// prints its stacks in the same way, is 2, after which systemd restarts nothing.
func TestCrashIsNoUsageError(t *testing.T) {
	t.Parallel()
	n := newNode(t, directory(t), "a", "", "")
	n.start()
	if err := unix.Prlimit(n.cmd.Process.Pid, unix.RLIMIT_CORE, &unix.Rlimit{}, nil); err != nil {
		t.Fatal(err)
	}
	code := n.stop(syscall.SIGQUIT)
	if state := n.cmd.ProcessState.Sys().(syscall.WaitStatus); !state.Signaled() || state.Signal() != syscall.SIGABRT {
		t.Errorf("exit code %d, %v", code, n.cmd.ProcessState)
	}
}

// notifySocket is the service manager's end.
type notifySocket struct {
	path string
	conn *net.UnixConn
	seen []string
}

func listenNotify(t *testing.T) *notifySocket {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return &notifySocket{path: path, conn: conn}
}

func (s *notifySocket) expect(t *testing.T, want string) {
	t.Helper()
	s.conn.SetReadDeadline(time.Now().Add(stateTime))
	b := make([]byte, 4096)
	for {
		n, err := s.conn.Read(b)
		if err != nil {
			t.Fatalf("no %s after %q: %v", want, s.seen, err)
		}
		if s.seen = append(s.seen, string(b[:n])); string(b[:n]) == want {
			return
		}
	}
}

func TestServeBadConfig(t *testing.T) {
	t.Parallel()
	dir := directory(t)
	config := filepath.Join(dir, "c.toml")
	serve := []string{"serve", "--config", config}
	fails(t, exitUsage, serve, config, "no such file")
	fails(t, exitUsage, []string{"serve", "--config", dir}, dir, "is a directory")
	// The table of bad configurations is the config package's test.
	for _, c := range []struct {
		text, want string
		exit       int
	}{
		{"region = \"/r\"\nrole = \"primary\"\n", config + ":2:1: role: unknown key", exitUsage},
		{"ack = \"both\"\n", config + ": region: is missing", exitUsage},
		{"region = \"" + dir + "/none.nvm\"\n[admin]\nsocket = \"" + dir + "/s.sock\"\n", "nvmmirrord create " + dir + "/none.nvm", exitFailed},
	} {
		if err := os.WriteFile(config, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		fails(t, c.exit, serve, c.want)
	}
	region := filepath.Join(dir, "other.nvm")
	if err := os.WriteFile(region, bytes.Repeat([]byte("precious"), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	of := func(region string) {
		text := fmt.Sprintf("region = %q\n[admin]\nsocket = %q\n", region, dir+"/s.sock")
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	of(dir)
	fails(t, exitUsage, serve, config+": region: is "+dir, "a directory")
	of("/dev/null")
	fails(t, exitUsage, serve, "/dev/null", "not a devdax one")
	for _, command := range []string{"check", "info"} {
		fails(t, exitUsage, []string{command, dir}, dir, "is a directory: name a file in it")
	}
	newer := golden(t, "newer")
	of(newer)
	fails(t, exitUsage, serve, newer, "needs a newer nvmmirror")
	of(region)
	fails(t, exitUsage, serve, region, "not an nvmmirror region")
	if b, err := os.ReadFile(region); err != nil || !bytes.Equal(b, bytes.Repeat([]byte("precious"), 1<<20)) {
		t.Errorf("a file that is no region was changed: %v", err)
	}
	if _, err := os.Lstat(dir + "/s.sock"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a socket was left: %v", err)
	}
}

func TestServeUnsafeKey(t *testing.T) {
	t.Parallel()
	a, _ := pairOf(t, "", "1s", sameKey)
	key := strings.TrimSuffix(a.region, ".nvm") + ".key"
	serve := []string{"serve", "--config", a.config}
	if err := os.Chmod(key, 0o640); err != nil {
		t.Fatal(err)
	}
	fails(t, exitUsage, serve, a.config, "peer.key_file", key, "has mode 0640: others than its owner have access; chmod 600")
	if err := os.WriteFile(key, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(key, 0o600); err != nil {
		t.Fatal(err)
	}
	fails(t, exitUsage, serve, key, "is empty", "nvmmirrord key generate")
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	fails(t, exitUsage, serve, key, "does not exist", "nvmmirrord key generate")
}

func TestServeAcceptLossBesideAPeer(t *testing.T) {
	t.Parallel()
	a, _ := pairOf(t, "", "1s", sameKey)
	fails(t, exitUsage, []string{"serve", "--config", a.config, "--accept-loss"}, "without [peer]")
	// A variable of a script that is not set is not a wish for any daemon.
	fails(t, exitUsage, []string{"promote", "--force", "--socket", ""}, "--socket", "is empty")
}

func TestServeTwice(t *testing.T) {
	t.Parallel()
	dir := directory(t)
	n := newNode(t, dir, "a", "", "")
	n.start()
	serve := func(region, socket string) []string {
		config := filepath.Join(dir, "second.toml")
		text := fmt.Sprintf("region = %q\n[admin]\nsocket = %q\n", region, socket)
		if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return []string{"serve", "--config", config}
	}
	other := filepath.Join(dir, "other.sock")
	fails(t, exitFailed, serve(n.region, other), n.region, fmt.Sprintf("is in use by process %d", n.cmd.Process.Pid))
	if _, err := os.Lstat(other); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the second daemon's socket is still there: %v", err)
	}
	free := filepath.Join(dir, "free.nvm")
	must(t, "create", free, "--size", "4MiB", "--journal-size", "2MiB", "--emulate")
	fails(t, exitFailed, serve(free, n.socket), n.socket, fmt.Sprintf("is in use by process %d", n.cmd.Process.Pid))
	if s := n.status(); s.Daemon.PID != n.cmd.Process.Pid {
		t.Errorf("process %d answers", s.Daemon.PID)
	}
	// A socket that a killed daemon left is no obstacle.
	n.kill()
	if _, err := os.Lstat(n.socket); err != nil {
		t.Fatalf("kill -9 left no socket: %v", err)
	}
	n.fails(exitFailed, []string{"status"}, "it was left by one that died")
	n.start()
	if s := n.status(); s.Daemon.PID != n.cmd.Process.Pid || s.Recovery.Clean {
		t.Errorf("process %d answers, recovery %+v", s.Daemon.PID, s.Recovery)
	}
}

// Another user is refused by the socket's mode, and where that was changed by
// the credentials.
func TestOtherUser(t *testing.T) {
	t.Parallel()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to run a command as another user")
	}
	dir := directory(t)
	n := newNode(t, dir, "a", "", "")
	n.start()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	as := func(uid uint32) result {
		c := exec.Command(program, n.args("status")...)
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}, Pdeathsig: syscall.SIGKILL}
		c.Dir = "/"
		var out, errs bytes.Buffer
		c.Stdout, c.Stderr = &out, &errs
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		c.Wait() // the code says it
		return result{c.ProcessState.ExitCode(), out.String(), errs.String()}
	}
	const nobody = 65534
	check(t, as(nobody), exitFailed, []string{"status"}, "permission denied; run the command as the daemon's user, or as root")
	if err := os.Chmod(n.socket, 0o666); err != nil {
		t.Fatal(err)
	}
	check(t, as(nobody), exitFailed, []string{"status"}, "uid 65534 may not use a daemon of uid 0")
	if r := as(0); r.code != exitDone {
		t.Errorf("root: %+v", r)
	}
}

func TestStopEndsWait(t *testing.T) {
	t.Parallel()
	a, _ := pairOf(t, "", "500ms", sameKey)
	a.start()
	waiting := make(chan result, 1)
	go func() { waiting <- command(t, nil, a.args("wait", "--for", "connected")...) }()
	// There is nothing to see of a wait: it may also find the daemon gone.
	a.eventually("waited for", func() bool { return len(a.log.String()) > 0 })
	if code := a.stop(syscall.SIGTERM); code != exitDone {
		t.Errorf("exit %d", code)
	}
	r := <-waiting
	if r.code != exitFailed {
		t.Errorf("%+v", r)
	}
}
