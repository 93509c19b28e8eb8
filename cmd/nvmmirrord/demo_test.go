package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// demoTime is the longest that it may take.
const demoTime = 30 * time.Second * slowdown

// demoRun is a demonstration in a process of its own.
type demoRun struct {
	t      *testing.T
	cmd    *exec.Cmd
	pipe   io.ReadCloser
	stdout *bufio.Reader
	stderr bytes.Buffer
	out    strings.Builder
	begin  time.Time
}

func startDemo(t *testing.T, user *syscall.Credential, args ...string) *demoRun {
	t.Helper()
	d := &demoRun{t: t, cmd: exec.Command(program, append([]string{"demo"}, args...)...), begin: time.Now()}
	// Pdeathsig would ask for a thread that lasts; cleanup is enough.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: user}
	d.cmd.Stderr = &d.stderr
	var err error
	if d.pipe, err = d.cmd.StdoutPipe(); err != nil {
		t.Fatal(err)
	}
	d.stdout = bufio.NewReader(d.pipe)
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.cmd.Process.Kill() // it has ended, unless the test failed
		d.cmd.Wait()
		if dir := d.dir(); dir != "" {
			for _, pid := range processesOf(t, dir) {
				syscall.Kill(pid, syscall.SIGKILL)
			}
			os.RemoveAll(dir)
		}
	})
	return d
}

// until reads the output up to a line that holds text, or to its end.
func (d *demoRun) until(text string) bool {
	d.t.Helper()
	for {
		line, err := d.stdout.ReadString('\n')
		d.out.WriteString(line)
		if text != "" && strings.Contains(line, text) {
			return true
		}
		if err != nil {
			return false
		}
	}
}

// end reads the rest, and returns the exit code.
func (d *demoRun) end() int {
	d.t.Helper()
	timer := time.AfterFunc(2*demoTime, func() { d.cmd.Process.Kill() })
	defer timer.Stop()
	d.until("")
	var exit *exec.ExitError
	if err := d.cmd.Wait(); err != nil && !errors.As(err, &exit) {
		d.t.Fatal(err)
	}
	took := time.Since(d.begin)
	d.t.Logf("%v:\n%s%s", took.Round(time.Millisecond), d.out.String(), d.stderr.String())
	if took > demoTime {
		d.t.Errorf("it took %v", took)
	}
	return d.cmd.ProcessState.ExitCode()
}

var demoDir = regexp.MustCompile(`/\S*/nvmmirror-demo-\d+`)

// dir is the directory that the demonstration made.
func (d *demoRun) dir() string { return demoDir.FindString(d.out.String()) }

func (d *demoRun) lastLine() string {
	text := strings.TrimSuffix(d.out.String(), "\n")
	return text[strings.LastIndexByte(text, '\n')+1:]
}

// steps checks that these steps are marked as done.
func (d *demoRun) steps(mark string, names ...string) {
	d.t.Helper()
	for _, name := range names {
		if !regexp.MustCompile(`(?m)^` + mark + ` +` + name + ` `).MatchString(d.out.String()) {
			d.t.Errorf("no step %q with %q", name, mark)
		}
	}
}

// nothingLeft checks that directory and daemons are gone.
func (d *demoRun) nothingLeft() {
	d.t.Helper()
	dir := d.dir()
	if dir == "" {
		d.t.Fatal("it did not say where the regions are")
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		d.t.Errorf("%s is left: %v", dir, err)
	}
	if pids := processesOf(d.t, dir); len(pids) > 0 {
		d.t.Errorf("processes %v are left", pids)
	}
}

// none waits until no daemon runs any more.
func (d *demoRun) none() {
	d.t.Helper()
	for deadline := time.Now().Add(stateTime); len(processesOf(d.t, d.dir())) > 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			d.t.Fatalf("processes %v still run", processesOf(d.t, d.dir()))
		}
	}
}

func sh(t *testing.T, line string) {
	t.Helper()
	if out, err := exec.Command("sh", "-ec", line).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", line, err, out)
	}
}

// processesOf are those that were started with a file in dir.
func processesOf(t *testing.T, dir string) (pids []int) {
	t.Helper()
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range lines {
		// Processes come and go meanwhile.
		if b, err := os.ReadFile(name); err == nil && bytes.Contains(b, []byte(dir+"/")) {
			var pid int
			fmt.Sscanf(name, "/proc/%d/", &pid)
			pids = append(pids, pid)
		}
	}
	return pids
}

var (
	demoSteps   = []string{"kernel", "prepare", "start", "in sync", "title", "load", "kill -9", "failover", "proof", "alone", "journals", "return", "identical"}
	demoVerdict = regexp.MustCompile(`^PASS: (\d+) transactions acknowledged, 0 lost, 0 wrong; failover took \d+\.\d+ (s|ms)$`)
)

func TestDemo(t *testing.T) {
	users := map[string]*syscall.Credential{"this user": nil}
	if os.Getuid() == 0 {
		users["ordinary user"] = &syscall.Credential{Uid: 65534, Gid: 65534}
	}
	for name, user := range users {
		t.Run(name, func(t *testing.T) {
			d := startDemo(t, user)
			if code := d.end(); code != exitDone {
				t.Errorf("exit %d", code)
			}
			d.steps("✓", demoSteps...)
			d.steps("(✓|-)", "wire")
			if user != nil {
				d.steps("-", "wire")
			}
			if !demoVerdict.MatchString(d.lastLine()) {
				t.Errorf("the last line is %q", d.lastLine())
			}
			d.nothingLeft()
		})
	}
}

// A byte of the survivor that is wrong is found, whoever changed it.
func TestDemoFails(t *testing.T) {
	for how, want := range map[string]string{
		"write":  ` transactions acknowledged, 0 lost, 1 wrong$`,
		"memory": ` transactions acknowledged, 0 lost, 0 wrong, \d+ in damaged blocks, which are not served$`,
	} {
		t.Run(how, func(t *testing.T) {
			t.Parallel()
			d := startDemo(t, nil, "--sabotage", how)
			if code := d.end(); code != exitFailed {
				t.Errorf("exit %d", code)
			}
			d.steps("FAIL", "proof")
			if !regexp.MustCompile(`^FAIL: proof: \d+` + want).MatchString(d.lastLine()) {
				t.Errorf("the last line is %q", d.lastLine())
			}
			d.nothingLeft()
		})
	}
}

func TestDemoInterrupted(t *testing.T) {
	for _, sig := range []syscall.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			d := startDemo(t, nil, "--keep") // it is not kept then
			if !d.until(" title ") {         // the load is next
				t.Fatalf("%s%s", d.out.String(), d.stderr.String())
			}
			if err := d.cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			if code := d.end(); code != exitFailed {
				t.Errorf("exit %d", code)
			}
			if want := "interrupted"; !strings.HasPrefix(d.lastLine(), "FAIL: ") || !strings.Contains(d.lastLine(), want) {
				t.Errorf("the last line is %q", d.lastLine())
			}
			d.nothingLeft()
		})
	}
}

// Nobody reads the output any more.
func TestDemoBrokenPipe(t *testing.T) {
	t.Parallel()
	d := startDemo(t, nil)
	if !d.until(" prepare ") {
		t.Fatalf("%s%s", d.out.String(), d.stderr.String())
	}
	d.pipe.Close()
	d.cmd.Wait() // how it ended is in ProcessState
	if d.cmd.ProcessState.ExitCode() != exitFailed || !strings.Contains(d.stderr.String(), "broken pipe") {
		t.Errorf("%v: %s", d.cmd.ProcessState, d.stderr.String())
	}
	d.nothingLeft()
}

// Killed itself, it leaves its directory, but no daemons.
func TestDemoKilled(t *testing.T) {
	t.Parallel()
	d := startDemo(t, nil)
	if !d.until(" title ") {
		t.Fatalf("%s%s", d.out.String(), d.stderr.String())
	}
	if err := d.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	d.cmd.Wait()
	d.none()
}

func TestDemoKeep(t *testing.T) {
	t.Parallel()
	d := startDemo(t, nil, "--keep")
	if code := d.end(); code != exitDone {
		t.Fatalf("exit %d", code)
	}
	dir := d.dir()
	pids := processesOf(t, dir)
	if len(pids) != 2 {
		t.Fatalf("processes %v run", pids)
	}
	sockets := regexp.MustCompile(`(?m) status --socket (\S+)$`).FindAllStringSubmatch(d.out.String(), -1)
	if len(sockets) != 2 {
		t.Fatal("it does not say where the sockets are")
	}
	for _, s := range sockets {
		if text := must(t, "status", "--socket", s[1]); !strings.Contains(text, "in-sync") {
			t.Errorf("%s", text)
		}
	}
	if !demoVerdict.MatchString(d.lastLine()) {
		t.Errorf("the last line is %q", d.lastLine())
	}
	// It is stopped and removed as it says.
	_, text, _ := strings.Cut(d.out.String(), "Stop and remove it:\n")
	commands := strings.Split(text, "\n")
	if len(commands) < 2 || !strings.HasPrefix(commands[0], "  kill ") || commands[1] != "  rm -r "+dir {
		t.Fatalf("commands %q", commands)
	}
	sh(t, commands[0])
	d.none()
	sh(t, commands[1])
	d.nothingLeft()
}
