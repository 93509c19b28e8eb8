package transport

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"strings"
)

// Each node has a key pair of its own: PREFIX.key stays with it, PREFIX.pub
// goes to the other node. Both are PEM as OpenSSL writes it: a PKCS #8 private
// key, and its SubjectPublicKeyInfo. Nothing is signed and nothing expires:
// the other node's .pub file is all the trust there is.

const (
	pemPrivate = "PRIVATE KEY"
	pemPublic  = "PUBLIC KEY"
	maxPEM     = 4 << 10 // bytes of a key file

	generateTLS = "make a pair with: nvmmirrord key generate --tls PREFIX"
)

// Pin is the SHA-256 of a public key's SubjectPublicKeyInfo.
type Pin [sha256.Size]byte

// String is how a pin is shown, for people to compare.
func (p Pin) String() string { return "sha256:" + base64.RawStdEncoding.EncodeToString(p[:]) }

// TLSKey is a node's private key.
type TLSKey struct {
	cert tls.Certificate
	pin  Pin
}

// NewTLSKey makes a key that lasts as long as the process.
func NewTLSKey() (*TLSKey, error) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, err
	}
	return newTLSKey(private)
}

// newTLSKey wraps the key into a certificate, as TLS wants it. Nobody looks
// at more of that than the public key.
func newTLSKey(private ed25519.PrivateKey) (*TLSKey, error) {
	public := private.Public().(ed25519.PublicKey)
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	if err != nil {
		return nil, err
	}
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return nil, err
	}
	return &TLSKey{
		cert: tls.Certificate{Certificate: [][]byte{der}, PrivateKey: private},
		pin:  sha256.Sum256(spki),
	}, nil
}

// Pin is what the peer must know of the key.
func (k *TLSKey) Pin() Pin { return k.pin }

// GenerateTLSKey writes a new private key to prefix.key, mode 0600, and its
// public part to prefix.pub, durably. It never overwrites.
func GenerateTLSKey(prefix string) (key, pub string, pin Pin, err error) {
	prefix = strings.TrimSuffix(prefix, ".key")
	key, pub = prefix+".key", prefix+".pub"
	if _, err := os.Lstat(pub); err == nil { // before anything is written
		return "", "", pin, exists(pub)
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return "", "", pin, err
	}
	secret, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return "", "", pin, err
	}
	spki, err := x509.MarshalPKIXPublicKey(public)
	if err != nil {
		return "", "", pin, err
	}
	if err := createKeyFile(key, 0o600, pem.EncodeToMemory(&pem.Block{Type: pemPrivate, Bytes: secret})); err != nil {
		return "", "", pin, err
	}
	if err := createKeyFile(pub, 0o644, pem.EncodeToMemory(&pem.Block{Type: pemPublic, Bytes: spki})); err != nil {
		_ = os.Remove(key) // ours, and of no use
		return "", "", pin, err
	}
	return key, pub, sha256.Sum256(spki), nil
}

// LoadTLSKey reads a private key. It refuses a file that somebody else could
// have read or written.
func LoadTLSKey(path string) (*TLSKey, error) {
	text, err := readKeyFile(path, maxPEM, generateTLS, checkKeyFile)
	if err != nil {
		return nil, err
	}
	der, err := decodePEM(path, text, pemPrivate)
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	private, ok := key.(ed25519.PrivateKey)
	if err != nil || !ok {
		return nil, &KeyFileError{path, "is not an Ed25519 private key", generateTLS, err}
	}
	return newTLSKey(private)
}

// LoadPin reads the peer's public key. It refuses a file that somebody else
// could have written.
func LoadPin(path string) (pin Pin, err error) {
	text, err := readKeyFile(path, maxPEM, "copy the .pub file that was generated on the other node", checkPublicFile)
	if err != nil {
		return pin, err
	}
	der, err := decodePEM(path, text, pemPublic)
	if err != nil {
		return pin, err
	}
	key, err := x509.ParsePKIXPublicKey(der)
	if _, ok := key.(ed25519.PublicKey); err != nil || !ok {
		return pin, &KeyFileError{path, "is not an Ed25519 public key", generateTLS + " on the other node", err}
	}
	return sha256.Sum256(der), nil
}

// decodePEM returns the one block of a file. What else administrators put
// there by mistake is named.
func decodePEM(path string, text []byte, want string) ([]byte, error) {
	block, rest := pem.Decode(text)
	_, md5 := parseKey(text)
	switch {
	case block == nil && md5 == "":
		return nil, &KeyFileError{path, "holds a key of md5sig", "with transport = \"tls\" each node has a key pair: " + generateTLS, nil}
	case block == nil:
		return nil, &KeyFileError{path, "holds no PEM block", generateTLS, nil}
	case block.Type == pemPublic && want == pemPrivate:
		return nil, &KeyFileError{path, "holds a public key", "tls_key is this node's .key file, tls_peer the other node's .pub file", nil}
	case block.Type == pemPrivate && want == pemPublic:
		return nil, &KeyFileError{path, "holds a private key", "tls_peer is the other node's .pub file; a private key does not leave its node: if this one did, generate a new pair", nil}
	case block.Type != want:
		return nil, &KeyFileError{path, fmt.Sprintf("holds a %s, not a %s", block.Type, want), generateTLS, nil}
	case len(bytes.TrimSpace(rest)) > 0:
		return nil, &KeyFileError{path, "holds more than one key", "leave the one that is meant", nil}
	}
	return block.Bytes, nil
}

func checkPublicFile(path string, info fs.FileInfo, euid int) error {
	if err := checkKeyOwner(path, info, euid); err != nil {
		return err
	}
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return &KeyFileError{path, fmt.Sprintf("has mode %04o: others than its owner can exchange it", perm), "chmod go-w " + path, nil}
	}
	return nil
}
