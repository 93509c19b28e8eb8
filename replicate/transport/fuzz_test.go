package transport

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

// FuzzTLSKeyFiles loads any text as a private key and as the peer's public one:
// a pin that is taken is one that a connection can match.
func FuzzTLSKeyFiles(f *testing.F) {
	key, pub, _, err := GenerateTLSKey(filepath.Join(f.TempDir(), "k"))
	if err != nil {
		f.Fatal(err)
	}
	for _, name := range []string{key, pub} {
		text, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
		f.Add(append(text, text...))
		f.Add(text[:len(text)/2])
	}
	f.Add([]byte("an-md5sig-key\n"))
	f.Add([]byte("-----BEGIN PUBLIC KEY-----\n\n-----END PUBLIC KEY-----\n"))
	f.Add([]byte("-----BEGIN PUBLIC KEY-----\nX: y\n\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		name := filepath.Join(t.TempDir(), "key")
		if err := os.WriteFile(name, text, 0o600); err != nil {
			t.Fatal(err)
		}
		k, err := LoadTLSKey(name)
		if fault := new(KeyFileError); err != nil && !errors.As(err, &fault) {
			t.Fatalf("%T: %v", err, err)
		}
		if err == nil {
			public, err := x509.MarshalPKIXPublicKey(k.cert.PrivateKey.(interface{ Public() crypto.PublicKey }).Public())
			if err != nil || k.Pin() != sha256.Sum256(public) {
				t.Fatalf("pin %v is of another key (%v)", k.Pin(), err)
			}
		}
		pin, err := LoadPin(name)
		if fault := new(KeyFileError); err != nil && !errors.As(err, &fault) {
			t.Fatalf("%T: %v", err, err)
		}
		if err != nil {
			return
		}
		block, _ := pem.Decode(text)
		public, err := x509.ParsePKIXPublicKey(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		canonical, err := x509.MarshalPKIXPublicKey(public)
		if err != nil || pin != sha256.Sum256(canonical) {
			t.Fatalf("no connection has the pin %v (%v)", pin, err)
		}
	})
}
