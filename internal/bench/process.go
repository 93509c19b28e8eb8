package bench

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const endTime = 10 * time.Second // for the child to end by itself

// child is the other end in a process of its own.
type child struct {
	*controller
	cmd    *exec.Cmd
	in     io.Closer
	stderr *tailWriter
	thread chan struct{} // closed: the thread that started it may end
	gone   chan struct{} // closed: it has ended
	once   sync.Once
	err    error
}

// startChild runs program, which calls [ServeChild], in the network namespace
// ns, or in this one.
func startChild(program []string, ns netns.NsHandle) (*child, error) {
	c := &child{thread: make(chan struct{}), gone: make(chan struct{}), stderr: &tailWriter{}}
	c.cmd = exec.Command(program[0], program[1:]...)
	// What a terminal sends is for this process, which ends the child in
	// order; the kernel ends it where this process cannot. A group of its
	// own, and not a session: the scheduler's autogroup would put the two
	// ends into different groups, and each wake-up would cost more.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	c.cmd.Stderr = c.stderr
	in, err := c.cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	started := make(chan error)
	go func() {
		// The kernel looks at the thread that forked, so that must last. It
		// is never unlocked, and so ends with this goroutine: it may be in
		// another namespace.
		runtime.LockOSThread()
		if ns.IsOpen() {
			if err := netns.Set(ns); err != nil {
				started <- err
				return
			}
		}
		started <- c.cmd.Start()
		<-c.thread
	}()
	if err := <-started; err != nil {
		close(c.thread)
		return nil, fmt.Errorf("start %s: %w", program[0], err)
	}
	go func() {
		defer close(c.gone)
		// It stays to be waited for: end has its exit code.
		for unix.Waitid(unix.P_PID, c.cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil) == unix.EINTR {
		}
	}()
	c.in = in
	c.controller = &controller{in: bufio.NewReader(out), out: in, local: loopback, peer: loopback, ns: netns.None()}
	return c, nil
}

// end ends the child and waits for it. It may be called again.
func (c *child) end() error {
	c.once.Do(func() {
		c.in.Close()
		late := time.AfterFunc(endTime, func() { c.cmd.Process.Kill() })
		err := c.cmd.Wait()
		late.Stop()
		close(c.thread)
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("the other end: %v: %s", exit, c.stderr.last())
		}
		c.err = err
	})
	return c.err
}

// tailWriter keeps the end of what is written to it.
type tailWriter struct {
	mu sync.Mutex
	b  []byte
}

func (w *tailWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.b = append(w.b, p...)
	if n := len(w.b) - 4096; n > 0 {
		w.b = bytes.Clone(w.b[n:])
	}
	return len(p), nil
}

func (w *tailWriter) last() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.TrimSpace(string(w.b))
}
