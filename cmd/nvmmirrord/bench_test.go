package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/internal/loopback"
)

func TestBenchCommit(t *testing.T) {
	dir := directory(t)
	args := []string{"bench", "commit", "--transport", "tls", "--region-size", "4MiB", "--journal-size", "2MiB", "--duration", "40ms", "--dir", dir}
	var got map[string]any
	if err := json.Unmarshal([]byte(must(t, append(args, "-o", "json", "--poll", "off", "--committers", "2")...)), &got); err != nil {
		t.Fatal(err)
	}
	for _, key := range strings.Fields("p50_us p99_us commits_per_s mb_per_s floor_p50_us floor_mb_per_s ratio_p50 ratio_mb rss_bytes cpu_s_per_gib") {
		if n, ok := got[key].(float64); !ok || n <= 0 {
			t.Errorf("%s is %v", key, got[key])
		}
	}
	if got["poll"] != "off" || got["committers"] != 2.0 || got["identical"] != true {
		t.Errorf("%v", got)
	}
	if text := must(t, args...); !strings.Contains(text, "raw floor") || !strings.Contains(text, "both regions are identical") {
		t.Errorf("%s", text)
	}
	for flag, value := range map[string]string{
		"--connections": "0", "--poll": "sometimes", "--size": "0", "--ack": "none", "--transport": "tls1.3",
		"--duration": "0s", "--committers": "-1", "--region-size": "lots", "--journal-size": "1", "--colour": "red",
	} {
		fails(t, exitUsage, []string{"bench", "commit", flag, value}, flag)
	}
	fails(t, exitUsage, []string{"bench", "commit", "more"})
	fails(t, exitUsage, []string{"bench"})
	fails(t, exitFailed, []string{"bench", "commit", "--dir", dir + "/none"}, "no such file")
}

func TestBenchWire(t *testing.T) {
	args := []string{"bench", "wire", "--duration", "10ms", "--transports", "plain,crc32c,md5-af_alg", "--sizes", "8,4KiB", "--connections", "1,2"}
	if text := must(t, args...); !strings.Contains(text, "crc32c") || !strings.Contains(text, "loopback") {
		t.Errorf("%s", text)
	}
	for flag, value := range map[string]string{
		"--transports": "pigeon", "--sizes": "2MiB", "--connections": "0", "--duration": "0s", "--verify": "none", "--mtu": "x",
	} {
		fails(t, exitUsage, []string{"bench", "wire", flag, value}, flag)
	}
	fails(t, exitUsage, []string{"bench", "wire", "--server", "--client", "a:1"})
	fails(t, exitUsage, []string{"bench", "wire", "--client", "a:1", "--netns"})
	fails(t, exitUsage, []string{"bench", "wire", "--mtu", "1500"}, "--netns")
	fails(t, exitUsage, []string{"bench", "wire", "--listen", ":1"}, "--server")
	fails(t, exitUsage, []string{"bench", "wire", "--server", "--duration", "1s"}, "--duration")
	for _, address := range []string{"localhost", "localhost:", "localhost:99999", "::1"} {
		fails(t, exitUsage, []string{"bench", "wire", "--client", address}, "--client", "address and a port")
		fails(t, exitUsage, []string{"bench", "wire", "--server", "--listen", address}, "--listen", "address and a port")
	}
	fails(t, exitFailed, []string{"bench", "wire", "--client", loopback.AddrPort(t).String()}, "connection refused")

	server := exec.Command(program, "bench", "wire", "--server", "--listen", "127.0.0.1:0")
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	defer server.Process.Kill()
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	address := strings.TrimSpace(strings.TrimPrefix(line, "listening on "))
	var got struct {
		Driver, Other struct{ Kernel string }
		Paths         []struct {
			Path       string
			Transports []struct{ Transport string }
		}
	}
	if err := json.Unmarshal([]byte(must(t, append(args, "--client", address, "-o", "json")...)), &got); err != nil {
		t.Fatal(err)
	}
	if len(got.Paths) != 1 || len(got.Paths[0].Transports) != 3 || got.Other.Kernel == "" {
		t.Errorf("%+v", got)
	}
	if err := server.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := server.Wait(); err != nil {
		t.Errorf("the server ended with %v", err)
	}
}

// TestBenchInterrupted: neither a terminal that is closed nor ^C leaves regions, which
// are memory, and what fails because of it is not what is said.
func TestBenchInterrupted(t *testing.T) {
	// Where the tests run under nohup, what they start would ignore it as well.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	defer signal.Reset(syscall.SIGHUP)
	for _, sig := range []os.Signal{syscall.SIGHUP, os.Interrupt} {
		dir := directory(t)
		args := []string{"bench", "commit", "--region-size", "4MiB", "--journal-size", "2MiB", "--duration", "1m", "--dir", dir}
		cmd := exec.Command(program, args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		var errs bytes.Buffer
		cmd.Stderr = &errs
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer cmd.Process.Kill()
		for deadline := time.Now().Add(stateTime); ; time.Sleep(time.Millisecond) {
			there, err := os.ReadDir(dir)
			if err != nil || time.Now().After(deadline) {
				t.Fatalf("no region in %v: %v", stateTime, err)
			}
			if len(there) > 0 {
				break
			}
		}
		if err := cmd.Process.Signal(sig); err != nil {
			t.Fatal(err)
		}
		cmd.Wait() // the code says it
		check(t, result{cmd.ProcessState.ExitCode(), "", errs.String()}, exitFailed, args, "nvmmirrord: interrupted")
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			t.Errorf("%v: %v are left: %v", sig, left, err)
		}
	}
}

func TestBenchReport(t *testing.T) {
	dir := t.TempDir()
	r := command(t, nil, "bench", "report", dir, "--duration", "10ms", "--parts", "loopback", "--transports", "plain,crc32c")
	if r.code != exitDone || !strings.Contains(r.stdout, "report.md") {
		t.Fatalf("exit %d: %s%s", r.code, r.stdout, r.stderr)
	}
	for _, name := range []string{"report.md", "report.json", "round-trip-loopback.svg"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	if err := os.Remove(filepath.Join(dir, "report.md")); err != nil {
		t.Fatal(err)
	}
	must(t, "bench", "report", dir, "--render")
	if _, err := os.Stat(filepath.Join(dir, "report.md")); err != nil {
		t.Error(err)
	}
	for flag, value := range map[string]string{"--duration": "0s", "--parts": "sea", "--transports": "pigeon"} {
		fails(t, exitUsage, []string{"bench", "report", dir, flag, value}, flag)
	}
	fails(t, exitUsage, []string{"bench", "report", dir, "--parts", "commit", "--transports", "crc32c"}, "nothing to measure")
	fails(t, exitUsage, []string{"bench", "report"})
	fails(t, exitUsage, []string{"bench", "report", dir, "--render", "--duration", "1s"}, "--render")
	// Before it measures anything: the default would take minutes.
	fails(t, exitFailed, []string{"bench", "report", filepath.Join(dir, "report.md")}, "not a directory")
	fails(t, exitFailed, []string{"bench", "report", dir, "--dir", filepath.Join(dir, "none")}, "--dir", "no such file")
	fails(t, exitFailed, []string{"bench", "report", t.TempDir(), "--render"}, "report.json")
}
