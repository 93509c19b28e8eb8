package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// missingError is why a peer is skipped: this machine lacks something.
type missingError struct{ what, install string }

func (e *missingError) Error() string {
	if e.install == "" {
		return e.what
	}
	return fmt.Sprintf("%s: apt-get install --no-install-recommends %s", e.what, e.install)
}

// program is the path of one of the names; Debian keeps some where only root's
// PATH looks.
func program(install string, names ...string) (string, error) {
	for _, name := range names {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", &missingError{"no " + names[0], install}
}

// server is a process of a peer's. It dies with this one.
type server struct {
	name  string
	cmd   *exec.Cmd
	log   string // the path of what it prints
	ended chan struct{}
}

const stopTime = 10 * time.Second // for a server to end by itself

// start starts a server, as the given user where there is one, and puts what
// it prints into dir.
func start(name, dir string, as *syscall.Credential, argv ...string) (*server, error) {
	s := &server{name: name, ended: make(chan struct{}), log: dir + "/" + name + ".log"}
	out, err := os.Create(s.log)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	s.cmd = exec.Command(argv[0], argv[1:]...)
	s.cmd.Dir = "/"
	// A group of its own: what a terminal sends is for this process, which ends
	// its servers in order.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL, Credential: as}
	s.cmd.Stdout, s.cmd.Stderr = out, out
	started := make(chan error)
	go func() {
		// The kernel kills the server when the thread that forked it ends.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := s.cmd.Start()
		started <- err
		if err == nil {
			s.cmd.Wait() // how it ended is in its log
			close(s.ended)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	return s, nil
}

// stop ends the server with a signal that makes it end in order, and waits.
func (s *server) stop(sig syscall.Signal) {
	if s == nil {
		return
	}
	s.cmd.Process.Signal(sig)
	select {
	case <-s.ended:
	case <-time.After(stopTime):
		s.cmd.Process.Kill()
		<-s.ended
	}
}

// await asks until f succeeds.
func (s *server) await(ctx context.Context, what string, f func() error) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
			continue
		case <-ctx.Done():
		case <-s.ended:
			err = errors.New("it has ended")
		}
		return fmt.Errorf("%s is not %s: %w; its log ends with:\n%s", s.name, what, err, s.tail())
	}
}

func (s *server) tail() string {
	b, err := os.ReadFile(s.log)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(len(lines)-10, 0):], "\n")
}

// run runs a command to its end, and returns what it prints.
func run(ctx context.Context, as *syscall.Credential, argv ...string) (string, error) {
	var stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.Dir, cmd.SysProcAttr, cmd.Stderr = "/", &syscall.SysProcAttr{Setpgid: true, Credential: as}, &stderr
	// It may have something to remove.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = stopTime
	out, err := cmd.Output()
	if ctx.Err() != nil {
		return "", fmt.Errorf("%s: %w", argv[0], context.Cause(ctx))
	}
	if err != nil {
		return "", fmt.Errorf("%s: %w\n%s", strings.Join(argv, " "), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return string(out), nil
}

// freePorts are of the kernel's choice, on loopback.
func freePorts(n int) ([]string, error) {
	var ports []string
	for range n {
		l, err := net.Listen("tcp4", "127.0.0.1:0")
		if err != nil {
			return nil, err
		}
		defer l.Close()
		ports = append(ports, strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
	}
	return ports, nil
}
