package demo

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nvmmirror/nvmmirror/internal/admin"
)

const (
	stateTime   = 10 * time.Second // for a state to come about
	commandTime = 10 * time.Second // for a command to end
	logTail     = 4 << 10          // bytes of a log that are shown
)

// starter starts processes, all from one thread that lasts as long as this
// process: so the kernel can end them with it, even by SIGKILL. It looks at
// the thread that forked.
type starter struct {
	bind     bool
	commands chan *exec.Cmd
	started  chan error
	once     sync.Once
}

// newStarter makes a starter. bind binds the processes to this one's life.
func newStarter(bind bool) *starter {
	s := &starter{bind: bind, commands: make(chan *exec.Cmd), started: make(chan error)}
	go func() {
		runtime.LockOSThread()
		for c := range s.commands {
			s.started <- c.Start()
		}
	}()
	return s
}

// start starts a process in a session of its own: what a terminal sends to
// the foreground is for this process, which ends the others in order.
func (s *starter) start(c *exec.Cmd) error {
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if s.bind {
		c.SysProcAttr.Pdeathsig = syscall.SIGKILL
	}
	s.commands <- c
	return <-s.started
}

// close ends the thread, and with it what is still bound to it.
func (s *starter) close() { s.once.Do(func() { close(s.commands) }) }

// daemon is one node with its files.
type daemon struct {
	name                        string
	program                     string
	config, region, socket, log string
	port                        int

	admin *admin.Client
	cmd   *exec.Cmd
	done  chan struct{} // closed when the process has ended
}

func newDaemon(program, dir, name string) *daemon {
	file := func(ext string) string { return filepath.Join(dir, name+ext) }
	n := &daemon{name: name, program: program, config: file(".toml"), region: file(".nvm"), socket: file(".sock"), log: file(".log")}
	n.admin = admin.NewClient(n.socket)
	return n
}

// configure writes the configuration.
func (n *daemon) configure(peer *daemon, key string) error {
	text := fmt.Sprintf(`region = %q
ack = "both"
on_peer_loss = "block"

[peer]
listen = "127.0.0.1:%d"
address = "127.0.0.1:%d"
key_file = %q
timeout = "1s"

[admin]
socket = %q
`, n.region, n.port, peer.port, key, n.socket)
	return os.WriteFile(n.config, []byte(text), 0o600)
}

// run starts the daemon and waits until it answers.
func (n *daemon) run(ctx context.Context, s *starter) error {
	log, err := os.OpenFile(n.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	cmd := exec.Command(n.program, "serve", "--config", n.config)
	cmd.Stdout, cmd.Stderr = log, log
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "NOTIFY_SOCKET=") { // who started us waits for us, not for it
			cmd.Env = append(cmd.Env, e)
		}
	}
	if err := s.start(cmd); err != nil {
		return err
	}
	done := make(chan struct{})
	n.cmd, n.done = cmd, done
	go func() {
		defer close(done)
		cmd.Wait() // how it ended is in ProcessState
	}()
	ctx, cancel := context.WithTimeout(ctx, stateTime)
	defer cancel()
	err = poll(ctx, func() (bool, error) {
		if !n.running() {
			return false, fmt.Errorf("%v: %s", cmd.ProcessState, n.lastLine())
		}
		_, err := n.admin.Status(ctx)
		return err == nil, nil
	})
	if err != nil {
		return fmt.Errorf("daemon %s does not come up: %w", n.name, err)
	}
	return nil
}

func (n *daemon) running() bool {
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

// kill is kill -9.
func (n *daemon) kill() error {
	if err := n.cmd.Process.Kill(); err != nil {
		return fmt.Errorf("kill %s: %w", n.name, err)
	}
	return nil
}

// stop stops the daemon cleanly.
func (n *daemon) stop(ctx context.Context) error {
	if !n.running() {
		return fmt.Errorf("%s has ended by itself: %v: %s", n.name, n.cmd.ProcessState, n.lastLine())
	}
	if err := n.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return fmt.Errorf("stop %s: %w", n.name, err)
	}
	t := time.NewTimer(stateTime)
	defer t.Stop()
	select {
	case <-n.done:
	case <-t.C:
		return fmt.Errorf("%s does not stop within %v of SIGTERM", n.name, stateTime)
	case <-ctx.Done():
		return ctx.Err()
	}
	if !n.cmd.ProcessState.Success() {
		return fmt.Errorf("%s stopped with %v: %s", n.name, n.cmd.ProcessState, n.lastLine())
	}
	return nil
}

// end ends the daemon whatever it does, and waits until it is gone.
func (n *daemon) end() {
	if n.running() {
		n.cmd.Process.Kill() // it may just have ended
		<-n.done
	}
	n.admin.Close()
}

func (n *daemon) lastLog() string {
	b, err := os.ReadFile(n.log)
	if err != nil {
		return ""
	}
	text := strings.TrimSpace(string(b))
	if len(text) > logTail {
		text = text[len(text)-logTail:]
		_, text, _ = strings.Cut(text, "\n")
	}
	return text
}

func (n *daemon) lastLine() string {
	text := n.lastLog()
	return text[strings.LastIndexByte(text, '\n')+1:]
}

// command runs nvmmirrord to its end.
func (d *demo) command(ctx context.Context, args ...string) error {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	out, err := exec.CommandContext(ctx, d.o.Program, args...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("nvmmirrord %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// freePorts are two TCP ports that the kernel chose.
func freePorts() (ports [2]int, err error) {
	var listeners [2]net.Listener
	for i := range ports {
		if listeners[i], err = net.Listen("tcp4", "127.0.0.1:0"); err != nil {
			break
		}
		ports[i] = listeners[i].Addr().(*net.TCPAddr).Port
	}
	for _, l := range listeners {
		if l != nil {
			err = errors.Join(err, l.Close())
		}
	}
	return ports, err
}
