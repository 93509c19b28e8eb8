package main

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

func TestUsage(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		args []string
		want string
	}{
		{nil, "name a command"},
		{[]string{"frobnicate"}, `unknown command "frobnicate"`},
		{[]string{"--frobnicate"}, "unknown flag: --frobnicate"},
		{[]string{"key"}, "name a command"},
		{[]string{"key", "destroy"}, `unknown command "destroy"`},
		{[]string{"help", "frobnicate"}, `unknown command "frobnicate"`},
		{[]string{"help", "key", "destroy"}, `unknown command "key destroy"`},
		{[]string{"key", "generate"}, "accepts 1 arg(s), received 0"},
		{[]string{"create", "x"}, `required flag(s) "size" not set`},
		{[]string{"create", "--size", "1GiB"}, "accepts 1 arg(s), received 0"},
		{[]string{"serve"}, `required flag(s) "config" not set`},
		{[]string{"serve", "--config", "x", "y"}, `unknown command "y"`},
		{[]string{"serve", "--config", "x", "--log-level", "loud"}, `invalid argument "loud"`},
		{[]string{"status", "-o", "yaml", "--socket", "x"}, `"yaml" is not json or text`},
		{[]string{"status", "--frobnicate"}, "unknown flag: --frobnicate"},
		{[]string{"wait", "--socket", "x"}, `required flag(s) "for" not set`},
		{[]string{"wait", "--socket", "x", "--for", "rain"}, `--for is "rain", not in-sync or connected`},
		{[]string{"wait", "--socket", "x", "--for", "in-sync", "--timeout", "-1s"}, "--timeout is -1s"},
		// Also without a daemon.
		{[]string{"wait", "--for", "rain"}, `--for is "rain", not in-sync or connected`},
		{[]string{"wait", "--for", "in-sync", "--timeout", "-1s"}, "--timeout is -1s"},
		{[]string{"write", "--socket", "x", "--offset", "-1"}, `"-1" is not a size`},
		{[]string{"write", "--socket", "x", "--offset", "0", "--chunk", "0"}, "nothing could be written"},
		{[]string{"read", "--socket", "x", "--offset", "0"}, `required flag(s) "length" not set`},
		{[]string{"promote", "--force=perhaps"}, "invalid argument"},
		{[]string{"demote", "now"}, `unknown command "now"`},
	} {
		fails(t, exitUsage, c.args, c.want)
	}
}

func TestHelp(t *testing.T) {
	t.Parallel()
	for _, c := range [][2][]string{{{"help"}, {"--help"}}, {{"help", "key", "generate"}, {"key", "generate", "--help"}}} {
		if a, b := must(t, c[0]...), must(t, c[1]...); a != b || !strings.Contains(a, "Usage:") {
			t.Errorf("%v: %s\n%v: %s", c[0], a, c[1], b)
		}
	}
}

func TestVersion(t *testing.T) {
	t.Parallel()
	if v := must(t, "--version"); !strings.HasPrefix(v, "nvmmirrord ") || strings.Count(v, "\n") != 1 {
		t.Errorf("%q", v)
	}
}

// A command whose output is lost has failed, and says so, whatever it did.
func TestOutputLost(t *testing.T) {
	t.Parallel()
	dir := directory(t)
	a, _ := inSync(t, "")
	const lost, device = "done, but what it printed is lost: ", "write /dev/stdout: no space left on device"
	file := func(name string) string { return filepath.Join(dir, name) }
	for _, c := range []struct {
		want string
		args []string
	}{
		{lost, []string{"--help"}},
		{lost, []string{"help", "key"}},
		{"", []string{"--version"}},
		{lost, []string{"create", file("r"), "--size", "4MiB", "--journal-size", "2MiB", "--emulate"}},
		{"", []string{"info", file("r")}},
		{"", []string{"check", file("r")}},
		{"", []string{"journal", "ls", file("r")}},
		{lost, []string{"key", "generate", file("k")}},
		{lost, []string{"key", "generate", "--tls", file("t")}},
		{lost, a.args("write", "--offset", "0")},
		{"", a.args("read", "--offset", "0", "--length", "1")},
		{"", a.args("status")},
		{lost, a.args("wait", "--for", "in-sync")},
		{"", a.args("journal", "ls")},
		{"", a.args("journal", "ls", "-o", "json")},
		{lost, a.args("demote")},
		{lost, a.args("promote")},
	} {
		full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
		if err != nil {
			t.Skip(err)
		}
		r := commandTo(t, full, strings.NewReader("data"), c.args...)
		full.Close()
		if want := "nvmmirrord: " + c.want + device + "\n"; r.code != exitFailed || !strings.HasSuffix(r.stderr, want) {
			t.Errorf("%v: exit %d, %q, not %q", c.args, r.code, r.stderr, want)
		}
	}
	if b := a.read(0, 4); string(b) != "data" {
		t.Errorf("%q was written", b)
	}
}

// One whose output nobody reads ends by the signal, as others do.
func TestOutputUnread(t *testing.T) {
	t.Parallel()
	if signal.Ignored(syscall.SIGPIPE) {
		t.Skip("the signal is ignored here")
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	defer w.Close()
	if r := commandTo(t, w, nil, "--help"); r.code != -1 || r.stderr != "" { // by SIGPIPE
		t.Errorf("exit %d, %q", r.code, r.stderr)
	}
}

func TestNoDaemon(t *testing.T) {
	t.Parallel()
	none := filepath.Join(t.TempDir(), "none.sock")
	for _, args := range [][]string{{"status"}, {"promote"}, {"demote"}, {"continue-alone"}, {"wait", "--for", "in-sync"}, {"read", "--offset", "0", "--length", "1"}, {"write", "--offset", "0"}} {
		fails(t, exitFailed, append(args, "--socket", none), "no daemon answers at "+none, "is nvmmirrord serve running")
	}
	if _, err := os.Stat("/run/nvmmirror"); !errors.Is(err, fs.ErrNotExist) {
		t.Skip("a daemon of this machine may be in /run/nvmmirror")
	}
	fails(t, exitFailed, []string{"status"}, "admin socket /run/nvmmirror: no daemon's socket is there", "--socket")
}

func TestCreate(t *testing.T) {
	t.Parallel()
	path := filepath.Join(directory(t), "r.nvm")
	args := []string{"create", path, "--size", "4MiB", "--journal-size", "2MiB", "--emulate"}
	if out := must(t, args...); out != "created "+path+": volume 4MiB, journal 2MiB, class emulated\n" {
		t.Errorf("%q", out)
	}
	before, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	fails(t, exitFailed, args, path, "exists")
	fails(t, exitFailed, append(args, "--allow-paged"), path, "exists")
	after, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(before, after) {
		t.Error("the second create changed the region")
	}
}

// Nothing is left of a region that is not created.
func TestCreateRefused(t *testing.T) {
	t.Parallel()
	dir := directory(t)
	path := filepath.Join(dir, "r.nvm")
	for _, c := range []struct {
		size, journal string
		code          int
		want          string
	}{
		{"", "2MiB", exitUsage, `"" is not a size such as 4096, 64KiB, 16MiB or 1GiB`},
		{"1GB", "2MiB", exitUsage, `"1GB" is not a size`},
		{"1.5GiB", "2MiB", exitUsage, `"1.5GiB" is not a size`},
		{"-4096", "2MiB", exitUsage, `"-4096" is not a size`},
		{"0x1000", "2MiB", exitUsage, `"0x1000" is not a size`},
		{"16777216TiB", "2MiB", exitUsage, `"16777216TiB" is too large`},
		{"99999999999999999999", "2MiB", exitUsage, `is not a size`},
		{"4MiB", "lots", exitUsage, `"lots" is not a size`},
		{"0", "2MiB", exitUsage, "size 0 is not a positive multiple of 4096 bytes"},
		{"5000", "2MiB", exitUsage, "size 5000 is not a positive multiple of 4096 bytes"},
		{"128TiB", "2MiB", exitUsage, "up to 64 TiB"},
		{"4MiB", "3MiB", exitUsage, "journal size 3145728 is not a multiple of 2097152 bytes"},
		{"4MiB", "1MiB", exitUsage, "journal size 1048576 is not a multiple of 2097152 bytes"},
		{"4MiB", "2TiB", exitUsage, "to 1 TiB"},
		{"4MiB", "0", exitUsage, "--journal-size is 0"},
	} {
		fails(t, c.code, []string{"create", path, "--size", c.size, "--journal-size", c.journal, "--emulate"}, c.want)
	}
	fails(t, exitUsage, []string{"create", path, "--size", "4MiB"}, path, "is of class emulated", "at least cacheline is required")
	fails(t, exitUsage, []string{"create", path, "--size", "4MiB", "--allow-paged"}, path, "at least paged is required")
	fails(t, exitUsage, []string{"create", dir, "--size", "4MiB", "--emulate"}, dir+" is a directory: name a file in it")
	fails(t, exitUsage, []string{"create", "", "--size", "4MiB", "--emulate"}, "PATH is empty")
	fails(t, exitFailed, []string{"create", filepath.Join(dir, "none", "r.nvm"), "--size", "4MiB", "--emulate"}, "no such file or directory")
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestKeyGenerate(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "k")
	must(t, "key", "generate", path)
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	key, err := transport.LoadKey(path)
	if err != nil || len(key) < 40 {
		t.Errorf("%d bytes, %v", len(key), err)
	}
	fails(t, exitFailed, []string{"key", "generate", path}, path, "exists and is not overwritten")
	if again, err := transport.LoadKey(path); err != nil || !bytes.Equal(again, key) {
		t.Errorf("the key changed: %v", err)
	}
}

// Nothing is written where a path names no file.
func TestKeyGenerateRefused(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	fails(t, exitUsage, []string{"key", "generate", ""}, "the path is empty")
	fails(t, exitUsage, []string{"key", "generate", "--tls", ""}, "the path is empty")
	for _, prefix := range []string{dir + "/", dir + "/.", dir + "/.key"} {
		fails(t, exitUsage, []string{"key", "generate", "--tls", prefix}, prefix+", which holds no name")
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

func TestSize(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]size{"0": 0, "4096": 4096, "7B": 7, "64KiB": 64 << 10, "3MiB": 3 << 20, "1GiB": 1 << 30, "2TiB": 2 << 40, "9223372036854775807": 1<<63 - 1} {
		var s size
		if err := s.Set(text); err != nil || s != want {
			t.Errorf("%s: %d, %v", text, s, err)
		}
		var again size
		if err := again.Set(s.String()); err != nil || again != s {
			t.Errorf("%s: shown as %s, read as %d, %v", text, &s, again, err)
		}
	}
	for _, text := range []string{"", "B", "KiB", "1KB", "1kib", "1 GiB", "+1", "1e3", "8388608TiB", "9223372036854775808"} {
		var s size
		if err := s.Set(text); err == nil {
			t.Errorf("%q taken as %d", text, s)
		}
	}
}
