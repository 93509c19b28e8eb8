package transport

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestGenerateKey(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.key")
	// Not even a strict umask makes a key that its owner cannot read.
	old := syscall.Umask(0o777)
	err := GenerateKey(path)
	syscall.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v, want 0600", info.Mode(), err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	key, err := LoadKey(path)
	if err != nil {
		t.Fatal(err)
	}
	if len(key) != 64 || !bytes.Equal(append(key, '\n'), text) {
		t.Errorf("the key has %d bytes and is not the file's one line", len(key))
	}

	// It never overwrites.
	var ke *KeyFileError
	if err := GenerateKey(path); !errors.As(err, &ke) || ke.Path != path {
		t.Errorf("a second key in the same file: %v", err)
	}
	if again, err := os.ReadFile(path); err != nil || !bytes.Equal(again, text) {
		t.Errorf("the key was changed: %v", err)
	}

	other := filepath.Join(t.TempDir(), "b.key")
	if err := GenerateKey(other); err != nil {
		t.Fatal(err)
	}
	if b, err := LoadKey(other); err != nil || bytes.Equal(b, key) {
		t.Errorf("two generated keys are equal, or: %v", err)
	}
	if err := GenerateKey(filepath.Join(t.TempDir(), "no", "dir")); !errors.As(err, &ke) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("in a directory that does not exist: %v", err)
	}
}

func TestLoadKey(t *testing.T) {
	const secret = "SeCrEt-of-the-pair"
	dir := t.TempDir()
	for i, c := range []struct {
		name, text string
		mode       fs.FileMode
		says       string // empty: the key is secret
	}{
		{"plain", secret, 0o600, ""},
		{"with newline", secret + "\n", 0o400, ""},
		{"group may read", secret, 0o640, "chmod 600 "},
		{"others may read", secret, 0o604, "chmod 600 "},
		{"others may write", secret, 0o602, "chmod 600 "},
		{"empty", "", 0o600, "is empty"},
		{"only a newline", "\n", 0o600, "is empty"},
		{"two newlines", secret + "\n\n", 0o600, "byte 19 "},
		{"two lines", secret + "\n" + secret + "\n", 0o600, "byte 19 "},
		{"carriage return", secret + "\r\n", 0o600, "byte 19 "},
		{"trailing space", secret + " \n", 0o600, "byte 19 "},
		{"NUL", "\x00" + secret, 0o600, "byte 1 "},
		{"not ASCII", secret + "é", 0o600, "byte 19 "},
		{"longest", strings.Repeat("k", MaxKeyLen) + "\n", 0o600, ""},
		{"too long", strings.Repeat("k", MaxKeyLen+1), 0o600, "more than the 80 bytes"},
		{"too long with newline", strings.Repeat("k", MaxKeyLen+1) + "\n", 0o600, "more than the 80 bytes"},
		{"a large file", strings.Repeat(secret, 1<<16), 0o600, "more than the 80 bytes"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(dir, string(rune('a'+i)))
			if err := os.WriteFile(path, []byte(c.text), c.mode); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, c.mode); err != nil { // whatever the umask
				t.Fatal(err)
			}
			key, err := LoadKey(path)
			if c.says == "" {
				if want := strings.TrimSuffix(c.text, "\n"); err != nil || string(key) != want {
					t.Errorf("%q, %v", key, err)
				}
				return
			}
			checkKeyError(t, err, path, c.says)
			if strings.Contains(err.Error(), secret) {
				t.Errorf("the error shows the key: %v", err)
			}
		})
	}
}

func checkKeyError(t *testing.T, err error, path, says string) {
	t.Helper()
	var ke *KeyFileError
	if !errors.As(err, &ke) || ke.Path != path || ke.Remedy == "" {
		t.Fatalf("%v is not a KeyFileError of %s with a remedy", err, path)
	}
	if !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "\n") {
		t.Errorf("%q does not say %q in one line", err, says)
	}
}

func TestLoadKeyOfOddFiles(t *testing.T) {
	dir := t.TempDir()
	missing := filepath.Join(dir, "missing")
	_, err := LoadKey(missing)
	checkKeyError(t, err, missing, "key generate")
	_, err = LoadKey(dir)
	checkKeyError(t, err, dir, "not a regular file")
	// Nobody writes to this FIFO: opening it must not wait.
	fifo := filepath.Join(dir, "fifo")
	if err := syscall.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = LoadKey(fifo)
	checkKeyError(t, err, fifo, "not a regular file")

	// A link is followed, and what it names is judged.
	file, link := filepath.Join(dir, "file"), filepath.Join(dir, "link")
	if err := GenerateKey(file); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadKey(link); err != nil {
		t.Error(err)
	}

	// A stranger's file, seen by a process that is neither it nor root.
	info, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	owner := info.Sys().(*syscall.Stat_t).Uid
	info.Sys().(*syscall.Stat_t).Uid = 12345
	checkKeyError(t, checkKeyFile(file, info, int(owner)), file, "belongs to uid 12345")
	info.Sys().(*syscall.Stat_t).Uid = 0
	if err := checkKeyFile(file, info, 12345); err != nil {
		t.Errorf("root's file: %v", err)
	}
}

func FuzzParseKey(f *testing.F) {
	f.Add([]byte("abc\n"))
	f.Add([]byte("a b"))
	f.Add(bytes.Repeat([]byte("k"), MaxKeyLen+2))
	f.Fuzz(func(t *testing.T, text []byte) {
		key, problem := parseKey(text)
		if (key == nil) == (problem == "") {
			t.Fatalf("key %q and problem %q", key, problem)
		}
		if key == nil {
			return
		}
		if len(key) == 0 || len(key) > MaxKeyLen {
			t.Fatalf("a key of %d bytes", len(key))
		}
		if rest, ok := bytes.CutPrefix(text, key); !ok || len(rest) > 0 && string(rest) != "\n" {
			t.Fatalf("%q became %q", text, key)
		}
	})
}
