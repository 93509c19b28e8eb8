package transport

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

func TestGenerateTLSKey(t *testing.T) {
	dir := t.TempDir()
	old := syscall.Umask(0o777)
	key, pub, pin, err := GenerateTLSKey(filepath.Join(dir, "node.key")) // the same as without .key
	syscall.Umask(old)
	if err != nil {
		t.Fatal(err)
	}
	if key != filepath.Join(dir, "node.key") || pub != filepath.Join(dir, "node.pub") {
		t.Errorf("wrote %s and %s", key, pub)
	}
	for path, mode := range map[string]fs.FileMode{key: 0o600, pub: 0o644} {
		if info, err := os.Stat(path); err != nil || info.Mode() != mode {
			t.Errorf("%s: mode %v, %v, want %v", path, info.Mode(), err, mode)
		}
	}
	k, err := LoadTLSKey(key)
	if err != nil || k.Pin() != pin {
		t.Errorf("the private key: %v", err)
	}
	if p, err := LoadPin(pub); err != nil || p != pin {
		t.Errorf("the public key: %v, %v, want %v", p, err, pin)
	}
	if !strings.HasPrefix(pin.String(), "sha256:") || len(pin.String()) != 50 {
		t.Errorf("pin %v", pin)
	}
	// Neither file is overwritten, whichever is there.
	before, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	var ke *KeyFileError
	if _, _, _, err := GenerateTLSKey(filepath.Join(dir, "node")); !errors.As(err, &ke) || !strings.Contains(err.Error(), "not overwritten") {
		t.Errorf("over both: %v", err)
	}
	if err := os.Remove(pub); err != nil {
		t.Fatal(err)
	}
	if _, _, _, err := GenerateTLSKey(filepath.Join(dir, "node")); !errors.As(err, &ke) || ke.Path != key {
		t.Errorf("over the private key: %v", err)
	}
	if now, err := os.ReadFile(key); err != nil || !bytes.Equal(now, before) {
		t.Errorf("the key was changed: %v", err)
	}
	if _, err := os.Lstat(pub); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a public key without its private one: %v", err)
	}
}

// TestTLSKeyIsOpenSSLs: the formats are those that administrators have tools
// for.
func TestTLSKeyIsOpenSSLs(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skipf("needs openssl: %v", err)
	}
	key, pub, _, err := GenerateTLSKey(filepath.Join(t.TempDir(), "a"))
	if err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(openssl, "pkey", "-in", key, "-pubout").Output()
	if err != nil {
		t.Fatal(err)
	}
	if want, err := os.ReadFile(pub); err != nil || !bytes.Equal(out, want) {
		t.Errorf("openssl makes of the private key %q, want %q, %v", out, want, err)
	}
	// A key that openssl made is as good; one of another kind is not.
	made := filepath.Join(t.TempDir(), "made.key")
	if out, err := exec.Command(openssl, "genpkey", "-algorithm", "ed25519", "-out", made).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := LoadTLSKey(made); err != nil {
		t.Error(err)
	}
	if out, err := exec.Command(openssl, "genpkey", "-algorithm", "x25519", "-out", made).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if _, err := LoadTLSKey(made); err == nil || !strings.Contains(err.Error(), "is not an Ed25519 private key") {
		t.Errorf("an X25519 key: %v", err)
	}
}

func TestLoadTLSFiles(t *testing.T) {
	dir := t.TempDir()
	key, pub, _, err := GenerateTLSKey(filepath.Join(dir, "a"))
	if err != nil {
		t.Fatal(err)
	}
	text := func(path string) string {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	private, public := text(key), text(pub)
	loadKey := func(path string) error { _, err := LoadTLSKey(path); return err }
	loadPin := func(path string) error { _, err := LoadPin(path); return err }
	for _, c := range []struct {
		name string
		load func(string) error
		text string
		mode fs.FileMode
		says string // "": fine
	}{
		{"key", loadKey, private, 0o600, ""},
		{"key, read-only", loadKey, private, 0o400, ""},
		{"key, readable by others", loadKey, private, 0o644, "others than its owner have access; chmod 600"},
		{"key, readable by a group", loadKey, private, 0o640, "others than its owner have access"},
		{"public as key", loadKey, public, 0o600, "holds a public key; tls_key is"},
		{"md5 key as key", loadKey, "MD5SIGkey\n", 0o600, "holds a key of md5sig"},
		{"empty", loadKey, "", 0o600, "holds no PEM block"},
		{"two keys", loadKey, private + private, 0o600, "more than one key"},
		{"torn key", loadKey, private[:60] + private[70:], 0o600, "holds no PEM block"},
		{"bad DER", loadKey, "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", 0o600, "is not an Ed25519 private key"},
		{"certificate", loadKey, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", 0o600, "holds a CERTIFICATE, not a PRIVATE KEY"},
		{"pin", loadPin, public, 0o644, ""},
		{"pin, nobody else's to read", loadPin, public, 0o600, ""},
		{"pin, writable by others", loadPin, public, 0o666, "others than its owner can exchange it; chmod go-w"},
		{"pin, writable by a group", loadPin, public, 0o664, "others than its owner can exchange it"},
		{"private as pin", loadPin, private, 0o600, "a private key does not leave its node"},
		{"md5 key as pin", loadPin, "MD5SIGkey", 0o600, "holds a key of md5sig"},
		{"bad DER as pin", loadPin, "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", 0o600, "is not an Ed25519 public key"},
	} {
		t.Run(c.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "file")
			if err := os.WriteFile(path, []byte(c.text), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, c.mode); err != nil {
				t.Fatal(err)
			}
			err := c.load(path)
			var ke *KeyFileError
			switch {
			case c.says == "" && err != nil:
				t.Error(err)
			case c.says != "" && (!errors.As(err, &ke) || !strings.Contains(err.Error(), c.says)):
				t.Errorf("%v does not say %q", err, c.says)
			case err != nil && strings.Contains(err.Error(), strings.Split(private, "\n")[1]):
				t.Error("the error holds key material")
			}
		})
	}
	for name, load := range map[string]func(string) error{"key": loadKey, "pin": loadPin} {
		if err := load(filepath.Join(dir, "none")); err == nil || !strings.Contains(err.Error(), "does not exist") {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The key of TLS where that of md5sig is wanted.
	if _, err := LoadKey(key); err == nil || !strings.Contains(err.Error(), "holds a key of TLS, not of md5sig") {
		t.Errorf("%v", err)
	}
}
