package admin

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	socketMode = 0o600
	probeTime  = time.Second     // for a daemon to take a connection
	lockTime   = 5 * time.Second // for another start to be through
)

// SocketError says why a daemon's socket could not be made, or found.
type SocketError struct {
	Path    string
	Problem string
	Remedy  string
	Err     error
}

func (e *SocketError) Error() string {
	s := "admin socket " + e.Path + ": " + e.Problem
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	if e.Remedy != "" {
		s += "; " + e.Remedy
	}
	return s
}

func (e *SocketError) Unwrap() error { return e.Err }

// Listen makes the daemon's socket, which only this user and root can connect
// to from the moment that it exists. One that a dead daemon left is replaced.
// Closing the listener removes it, unless another one is there by then.
func Listen(path string, log *zap.Logger) (net.Listener, error) {
	dir := filepath.Dir(path)
	if err := ensureDir(path, dir, log); err != nil {
		return nil, err
	}
	// Between finding a dead socket and replacing it nobody else may replace
	// it: two daemons that start at once would remove each other's.
	unlock, err := lockDir(dir)
	if err != nil {
		return nil, &SocketError{path, "its directory is not locked", "check the directory and its permissions", err}
	}
	defer unlock()
	if err := removeStale(path, log); err != nil {
		return nil, err
	}
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) error {
		// The mode of a socket's file is that of the socket when it is bound.
		var err error
		if e := c.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), socketMode) }); e != nil {
			return e
		}
		return err
	}}
	l, err := lc.Listen(context.Background(), "unix", path)
	if err != nil {
		return nil, &SocketError{path, "not made", "check the directory and its permissions", bare(err)}
	}
	info, err := os.Lstat(path)
	if err != nil || info.Mode().Perm()&0o177 != 0 {
		l.Close()
		return nil, &SocketError{path, "others than its owner have access", "put it on a file system that keeps permissions", err}
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	return &listener{Listener: l, path: path, made: info}, nil
}

// listener is one on a socket at path.
type listener struct {
	net.Listener
	path   string
	made   os.FileInfo
	remove sync.Once // a later file may have the same number
}

func (l *listener) Close() error {
	l.remove.Do(func() {
		if now, err := os.Lstat(l.path); err == nil && os.SameFile(now, l.made) {
			os.Remove(l.path) // who finds one that is left, finds it dead
		}
	})
	return l.Listener.Close()
}

// ensureDir makes a missing directory under /run, which is empty after a boot.
func ensureDir(path, dir string, log *zap.Logger) error {
	switch info, err := os.Stat(dir); {
	case err == nil && info.IsDir():
		return nil
	case err == nil:
		return &SocketError{path, dir + " is not a directory", "set admin.socket to a path in a directory", nil}
	case !errors.Is(err, fs.ErrNotExist):
		return &SocketError{path, "its directory cannot be looked at", "", err}
	case filepath.Dir(dir) != "/run":
		return &SocketError{path, "its directory does not exist", "make it, owned by the daemon's user: mkdir -p " + dir, nil}
	}
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return &SocketError{path, "its directory is not made", "make it, owned by the daemon's user, or set admin.socket to a path elsewhere", err}
	}
	log.Info("made the admin socket's directory", zap.String("directory", dir))
	return nil
}

func lockDir(dir string) (unlock func(), err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for deadline := time.Now().Add(lockTime); ; time.Sleep(10 * time.Millisecond) {
		err = unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { d.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) || time.Now().After(deadline) {
			d.Close()
			return nil, fmt.Errorf("flock: %w", err)
		}
	}
}

// removeStale removes a socket on which nobody listens.
func removeStale(path string, log *zap.Logger) error {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return &SocketError{path, "cannot be looked at", "", err}
	case info.Mode()&fs.ModeSocket == 0:
		return &SocketError{path, "is there and is no socket; it is left as it is", "set admin.socket to another path", nil}
	}
	conn, err := net.DialTimeout("unix", path, probeTime)
	if err == nil {
		defer conn.Close()
		who := "another process"
		if cred, err := peerCredentials(conn); err == nil {
			who = fmt.Sprintf("process %d", cred.Pid)
		}
		return &SocketError{path, "is in use by " + who, "stop that daemon, or set admin.socket to another path", nil}
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return &SocketError{path, "is there, and whether a daemon uses it is not clear", "remove it if none does", bare(err)}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return &SocketError{path, "was left by a daemon that died and cannot be removed", "remove it", err}
	}
	log.Info("removed the socket of a daemon that died", zap.String("socket", path))
	return nil
}

// peerCredentials are those of the process that connected, or listens, at the
// other end.
func peerCredentials(c net.Conn) (*unix.Ucred, error) {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return nil, fmt.Errorf("%T is not a Unix socket", c)
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return nil, err
	}
	var cred *unix.Ucred
	if e := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil {
		return nil, e
	}
	return cred, err
}

// FindSocket is the only socket in dir, or the only one of several at which a
// daemon answers.
func FindSocket(dir string) (string, error) { return findSocket(dir, dead) }

// OnlySocket is the only socket in dir. One that a daemon left which died counts: a
// change that is meant for its region must not go to another's.
func OnlySocket(dir string) (string, error) { return findSocket(dir, nil) }

func findSocket(dir string, skip func(string) bool) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", &SocketError{dir, "cannot be searched", "name the daemon's socket with --socket", bare(err)}
	}
	var found []string
	for _, e := range entries {
		if e.Type()&fs.ModeSocket != 0 {
			found = append(found, filepath.Join(dir, e.Name()))
		}
	}
	all := len(found)
	if all > 1 && skip != nil {
		found = slices.DeleteFunc(found, skip)
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		problem := "no daemon's socket is there"
		if all > 0 {
			problem = fmt.Sprintf("%d sockets are there, and no daemon answers at them", all)
		}
		return "", &SocketError{dir, problem, "start one with: nvmmirrord serve --config FILE, or name its socket with --socket", nil}
	}
	return "", &SocketError{dir, fmt.Sprintf("there are %d sockets", len(found)), "name one with --socket: " + strings.Join(found, ", "), nil}
}

// dead reports whether a daemon that died left the socket: nobody listens.
func dead(socket string) bool {
	conn, err := net.DialTimeout("unix", socket, probeTime)
	if err == nil {
		conn.Close()
	}
	return errors.Is(err, unix.ECONNREFUSED)
}

// bare strips the addresses and paths that the standard library adds: the
// SocketError names them.
func bare(err error) error {
	for {
		var op *net.OpError
		var path *fs.PathError
		var sys *os.SyscallError
		switch {
		case errors.As(err, &op):
			err = op.Err
		case errors.As(err, &path):
			err = path.Err
		case errors.As(err, &sys):
			err = sys.Err
		default:
			return err
		}
	}
}
