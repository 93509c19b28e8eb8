package faultwire

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The test binary runs itself as a child in one of these roles.
const (
	childRole     = "FAULTWIRE_TEST_CHILD"
	roleNamespace = "namespace" // prints the network namespace that it is in
	roleDial      = "dial "     // connects to the address that follows and greets
	roleWire      = "wire"      // makes a wire, says so, and waits for its end
	roleNew       = "new"       // prints what New says
)

func runChild(role string) int {
	err := func() error {
		if address, ok := strings.CutPrefix(role, roleDial); ok {
			c, err := net.Dial("tcp", address)
			if err != nil {
				return err
			}
			_, err = c.Write([]byte("from the child"))
			return errors.Join(err, c.Close())
		}
		switch role {
		case roleNamespace:
			id, err := os.Readlink("/proc/self/ns/net")
			fmt.Print(id)
			return err
		case roleWire:
			w, err := New(Config{})
			if err != nil {
				return err
			}
			for _, h := range []*Host{w.A, w.B} {
				if err := h.Do(func() error {
					id, err := os.Readlink(ownNamespace)
					fmt.Println(id)
					return err
				}); err != nil {
					return err
				}
			}
			_, err = io.Copy(io.Discard, os.Stdin)
			return err
		case roleNew:
			_, err := New(Config{})
			fmt.Print(errors.Is(err, ErrNotPermitted), " ", err)
			return nil
		}
		return fmt.Errorf("unknown role %q", role)
	}()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func child(ctx context.Context, role string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/proc/self/exe")
	cmd.Env = append(os.Environ(), childRole+"="+role)
	cmd.Stderr = os.Stderr
	return cmd
}

func TestProcessInsideTheNamespace(t *testing.T) {
	w := needWire(t, Config{})
	for _, h := range []*Host{w.A, w.B} {
		var out bytes.Buffer
		cmd := child(testContext(t), roleNamespace)
		cmd.Stdout = &out
		if err := h.Run(cmd); err != nil {
			t.Fatal(err)
		}
		if want := namespaceOf(t, h); out.String() != want {
			t.Errorf("%s: the process was in %s, want %s", h.Name, &out, want)
		}
	}
	l, err := w.B.Listen(t.Context(), &net.ListenConfig{}, "tcp4", w.B.Addr.String()+":0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	cmd := child(testContext(t), roleDial+l.Addr().String())
	if err := w.A.Start(cmd); err != nil {
		t.Fatal(err)
	}
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if err := expect(c, "from the child"); err != nil {
		t.Error(err)
	}
	if err := errors.Join(c.Close(), cmd.Wait()); err != nil {
		t.Error(err)
	}
}

// A wire whose process is killed leaves nothing: no name, no mount, no device
// here, and no process in its namespaces.
func TestKilledWireLeavesNothing(t *testing.T) {
	_ = needWire(t, Config{}).Close() // skips where it may not be made
	before := traces(t)
	cmd := child(testContext(t), roleWire)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var ids []string
	for lines := bufio.NewScanner(out); len(ids) < 2 && lines.Scan(); {
		ids = append(ids, lines.Text())
	}
	if len(ids) != 2 {
		t.Fatalf("the child named %v", ids)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("the child ended by itself")
	}
	if after := traces(t); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	tasks, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	for _, task := range tasks {
		id, err := os.Readlink("/proc/" + task.Name() + "/ns/net")
		if err == nil && (id == ids[0] || id == ids[1]) {
			t.Errorf("process %s is still in %s", task.Name(), id)
		}
	}
}

// traces are the places where a namespace or a device could have been left.
func traces(t *testing.T) string {
	t.Helper()
	var b strings.Builder
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, "nsfs") {
			b.WriteString(line)
		}
	}
	names, err := os.ReadDir("/run/netns")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	for _, n := range names {
		fmt.Fprintln(&b, n.Name())
	}
	devices, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range devices {
		fmt.Fprintln(&b, d.Name)
	}
	return b.String()
}

// Without a capability New says so, and which step failed.
func TestNotPermitted(t *testing.T) {
	for name, c := range map[string]struct {
		capability uintptr
		step       string
	}{
		"CAP_SYS_ADMIN": {unix.CAP_SYS_ADMIN, "a new network namespace"},
		"CAP_NET_ADMIN": {unix.CAP_NET_ADMIN, "TUN device"},
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			cmd := child(testContext(t), roleNew)
			cmd.Stdout = &out
			started := make(chan error, 1)
			go func() {
				// What is dropped is the thread's for good: it ends with this
				// goroutine. A child of root gets what the bounding set has left.
				runtime.LockOSThread()
				err := unix.Prctl(unix.PR_CAPBSET_DROP, c.capability, 0, 0, 0)
				if err == nil || errors.Is(err, unix.EPERM) { // EPERM: had none anyway
					err = cmd.Start()
				}
				started <- err
			}()
			if err := errors.Join(<-started, cmd.Wait()); err != nil {
				t.Fatal(err)
			}
			if !strings.HasPrefix(out.String(), "true ") {
				t.Errorf("not ErrNotPermitted: %s", &out)
			}
			if os.Geteuid() == 0 && !strings.Contains(out.String(), c.step) {
				t.Errorf("does not name %q: %s", c.step, &out)
			}
		})
	}
}
