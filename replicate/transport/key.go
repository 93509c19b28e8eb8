package transport

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
)

// A key file is one line of 1 to MaxKeyLen printable ASCII characters without
// spaces, and the key is those characters as they stand. Both nodes hold the
// same file. What cannot be seen in an editor is refused, since it would make
// two files that look equal differ.

// generatedKeyBytes of randomness become 64 characters of base64.
const generatedKeyBytes = 48

// KeyFileError says what is wrong with a key file and what to do about it. It
// never holds key material.
type KeyFileError struct {
	Path    string
	Problem string
	Remedy  string
	Err     error // the system's answer, if there was one
}

func (e *KeyFileError) Error() string {
	s := fmt.Sprintf("key file %s: %s", e.Path, e.Problem)
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	if e.Remedy != "" {
		s += "; " + e.Remedy
	}
	return s
}

func (e *KeyFileError) Unwrap() error { return e.Err }

// GenerateKey writes a new random key to path, mode 0600, durably. It never
// overwrites. The error is a *KeyFileError.
func GenerateKey(path string) error {
	var random [generatedKeyBytes]byte
	_, _ = rand.Read(random[:]) // never fails: the program is ended instead
	return createKeyFile(path, 0o600, append(base64.RawURLEncoding.AppendEncode(nil, random[:]), '\n'))
}

// createKeyFile writes a new file, durably.
func createKeyFile(path string, mode fs.FileMode, text []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return exists(path)
	}
	if err != nil {
		return &KeyFileError{path, "not created", "check the directory and its permissions", bare(err)}
	}
	if err := writeKey(f, mode, text); err != nil {
		_ = f.Close()
		_ = os.Remove(path) // ours: O_EXCL made it
		return &KeyFileError{path, "not written", "check the space left on the file system", bare(err)}
	}
	if err := syncDir(filepath.Dir(path)); err != nil {
		return &KeyFileError{path, "written, but its directory entry may not survive a crash", "check the file system", bare(err)}
	}
	return nil
}

func exists(path string) error {
	return &KeyFileError{path, "exists and is not overwritten", "remove it first if no node uses it any more, or choose another name", nil}
}

// writeKey fills and closes f.
func writeKey(f *os.File, mode fs.FileMode, text []byte) error {
	// A strict umask may have taken the owner's own bits.
	if err := f.Chmod(mode); err != nil {
		return err
	}
	if _, err := f.Write(text); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return f.Close()
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	return errors.Join(err, d.Close())
}

// LoadKey reads the key in path. It refuses a file that somebody else could
// have read or written. The error is a *KeyFileError.
func LoadKey(path string) ([]byte, error) {
	const generate = "make one with: nvmmirrord key generate FILE, and copy it to the other node"
	// One byte more than the longest line shows a file that is too long.
	text, err := readKeyFile(path, MaxKeyLen+2, generate, checkKeyFile)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(text, []byte("-----BEGIN ")) {
		return nil, &KeyFileError{path, "holds a key of TLS, not of md5sig", "with transport = \"tls\" it is tls_key or tls_peer; for md5sig " + generate, nil}
	}
	key, problem := parseKey(text)
	if problem != "" {
		return nil, &KeyFileError{path, problem, generate, nil}
	}
	return key, nil
}

// readKeyFile returns at most limit bytes of a file that passes check.
func readKeyFile(path string, limit int64, missing string, check func(path string, info fs.FileInfo, euid int) error) ([]byte, error) {
	// O_NONBLOCK: a FIFO must not hold us up before it is refused.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, &KeyFileError{path, "does not exist", missing, nil}
	}
	if err != nil {
		return nil, &KeyFileError{path, "not opened", "check its path and permissions", bare(err)}
	}
	defer func() { _ = f.Close() }()
	// The open file is judged, not the name, which could be exchanged.
	info, err := f.Stat()
	if err != nil {
		return nil, &KeyFileError{path, "not examined", "check the file system", bare(err)}
	}
	if err := check(path, info, os.Geteuid()); err != nil {
		return nil, err
	}
	text, err := io.ReadAll(io.LimitReader(f, limit))
	if err != nil {
		return nil, &KeyFileError{path, "not read", "check the file system", bare(err)}
	}
	return text, nil
}

// checkKeyFile judges a file that holds a secret.
func checkKeyFile(path string, info fs.FileInfo, euid int) error {
	if err := checkKeyOwner(path, info, euid); err != nil {
		return err
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return &KeyFileError{path, fmt.Sprintf("has mode %04o: others than its owner have access", perm), "chmod 600 " + path, nil}
	}
	return nil
}

func checkKeyOwner(path string, info fs.FileInfo, euid int) error {
	if !info.Mode().IsRegular() {
		return &KeyFileError{path, "is not a regular file", "name the file itself", nil}
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return &KeyFileError{path, "has no owner that can be checked", "put it on a local file system", nil}
	}
	if st.Uid != 0 && int(st.Uid) != euid {
		return &KeyFileError{path, fmt.Sprintf("belongs to uid %d, neither root nor this process (uid %d)", st.Uid, euid), fmt.Sprintf("chown %d %s", euid, path), nil}
	}
	return nil
}

// parseKey returns the key, or what is wrong with the text.
func parseKey(text []byte) (key []byte, problem string) {
	key = bytes.TrimSuffix(text, []byte("\n"))
	switch {
	case len(key) == 0:
		return nil, "is empty"
	case len(key) > MaxKeyLen:
		return nil, fmt.Sprintf("holds more than the %d bytes that a key may have", MaxKeyLen)
	}
	for i, b := range key {
		if b <= ' ' || b > '~' {
			return nil, fmt.Sprintf("byte %d is not a printable ASCII character: a key is one line without spaces", i+1)
		}
	}
	return key, ""
}

// bare strips the path that package os adds: the KeyFileError names it.
func bare(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}
