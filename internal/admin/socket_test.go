package admin

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap"
)

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	l, err := Listen(path, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Lstat(path)
	if err != nil || info.Mode() != fs.ModeSocket|socketMode {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	_, err = Listen(path, zap.NewNop())
	if err == nil || !strings.Contains(err.Error(), "is in use by process ") {
		t.Errorf("a live socket: %v", err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the live socket is gone: %v", err)
	}
	l.Close()
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("closed, and still there: %v", err)
	}
}

func TestListenReplacesDead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	l, err := Listen(path, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	l.Close()
}

func TestListenLeavesOthersAlone(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s.sock")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, zap.NewNop()); err == nil || !strings.Contains(err.Error(), "is no socket") {
		t.Errorf("a file: %v", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := Listen(filepath.Join(dir, "none", "s.sock"), zap.NewNop()); err == nil || !strings.Contains(err.Error(), "directory does not exist") {
		t.Errorf("no directory: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a directory outside of /run was made: %v", err)
	}
	if _, err := Listen(filepath.Join(path, "s.sock"), zap.NewNop()); err == nil {
		t.Error("a file taken for a directory")
	}
}

func TestFindSocket(t *testing.T) {
	dir := t.TempDir()
	if _, err := FindSocket(filepath.Join(dir, "none")); err == nil || !strings.Contains(err.Error(), "no daemon's socket is there") {
		t.Errorf("no directory: %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := FindSocket(dir); err == nil || !strings.Contains(err.Error(), "no daemon's socket is there") {
		t.Errorf("none: %v", err)
	}
	var paths []string
	for _, name := range []string{"a.sock", "b.sock"} {
		p := filepath.Join(dir, name)
		l, err := Listen(p, zap.NewNop())
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		paths = append(paths, p)
		if name == "a.sock" {
			if got, err := FindSocket(dir); err != nil || got != p {
				t.Errorf("one: %q, %v", got, err)
			}
		}
	}
	_, err := FindSocket(dir)
	if err == nil || !strings.Contains(err.Error(), "there are 2 sockets; name one with --socket: "+strings.Join(paths, ", ")) {
		t.Errorf("two: %v", err)
	}
}

// A socket that a dead daemon left does not hide the live one.
func TestFindSocketBesideDead(t *testing.T) {
	dir := t.TempDir()
	dead := func(name string) string {
		path := filepath.Join(dir, name)
		l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
		if err != nil {
			t.Fatal(err)
		}
		l.SetUnlinkOnClose(false)
		l.Close()
		return path
	}
	only := dead("a.sock")
	if got, err := FindSocket(dir); err != nil || got != only {
		t.Errorf("one, and dead: %q, %v", got, err)
	}
	dead("b.sock")
	if _, err := FindSocket(dir); err == nil || !strings.Contains(err.Error(), "2 sockets are there, and no daemon answers at them") {
		t.Errorf("two, both dead: %v", err)
	}
	live := filepath.Join(dir, "c.sock")
	l, err := Listen(live, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if got, err := FindSocket(dir); err != nil || got != live {
		t.Errorf("one live: %q, %v", got, err)
	}
	if got, err := OnlySocket(dir); err == nil || !strings.Contains(err.Error(), "there are 3 sockets; name one with --socket: ") {
		t.Errorf("the only one: %q, %v", got, err)
	}
}

// A listener whose socket was removed leaves alone the one that another daemon has
// made in its place.
func TestListenLeavesAnothersSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	first, err := Listen(path, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second, err := Listen(path, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	for range 2 { // the HTTP server does, and who made it
		if err := second.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Error(err)
		}
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
	third, err := Listen(path, zap.NewNop()) // it may have the second one's inode
	if err != nil {
		t.Fatal(err)
	}
	defer third.Close()
	second.Close()
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("closed once more, it removed another's socket: %v", err)
	}
}
