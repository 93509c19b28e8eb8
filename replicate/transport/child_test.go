package transport

import (
	"bufio"
	"crypto/ed25519"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"testing"
	"time"
)

// The benchmarks' other end is a process of its own, as in life: this test
// binary again, told by childEnv which transport to serve.
const childEnv = "TRANSPORT_TEST_CHILD"

// order is what the benchmark asks of the child; the first bytes of a
// connection. The child then answers each bytes bytes with 8, until the end.
type order struct {
	bytes int
	poll  bool
}

const orderLen = 9

func (o order) encode() []byte {
	p := binary.LittleEndian.AppendUint64(nil, uint64(o.bytes))
	if o.poll {
		return append(p, 1)
	}
	return append(p, 0)
}

func benchTransport(name string) (Transport, error) {
	switch name {
	case NameMD5Sig:
		return NewMD5Sig(loop4, testKey, Options{})
	case NameTLS:
		key, err := newTLSKey(ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize)))
		if err != nil {
			return nil, err
		}
		return tlsOfBoth(loop4, key)
	}
	return NewPlain(loop4, Options{})
}

// runChild prints its port and serves until standard input ends, which it
// does with the parent.
func runChild() {
	fail := func(err error) {
		fmt.Fprintln(os.Stderr, "child:", err)
		os.Exit(1)
	}
	tr, err := benchTransport(os.Getenv(childEnv))
	if err != nil {
		fail(err)
	}
	l, err := tr.Listen(netip.AddrPortFrom(loop4, 0))
	if err != nil {
		fail(err)
	}
	fmt.Println(l.Addr())
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	for {
		c, err := l.Accept()
		if err != nil {
			fail(err)
		}
		go func() {
			if err := answer(c); err != nil && !errors.Is(err, io.EOF) {
				fail(err)
			}
			_ = c.Close()
		}()
	}
}

func answer(c Conn) error {
	head := make([]byte, orderLen)
	if err := readFull(c, head); err != nil {
		return err
	}
	o := order{int(binary.LittleEndian.Uint64(head)), head[8] == 1}
	buf, reply := make([]byte, min(o.bytes, 1<<20)), [][]byte{make([]byte, 8)}
	for {
		for left := o.bytes; left > 0; {
			n, err := c.TryRead(buf[:min(left, len(buf))])
			if err != nil {
				return err
			}
			if left -= n; n == 0 && !o.poll {
				if err := c.Wait(false, patience); err != nil {
					return err
				}
			}
		}
		if _, err := c.TryWrite(reply); err != nil {
			return err
		}
	}
}

// startChild returns a function that connects to a child of its own.
func startChild(b *testing.B, transport string) func(order) Conn {
	b.Helper()
	if transport == NameMD5Sig {
		needMD5(b)
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+transport)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			b.Error(err)
		}
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		b.Fatal(err)
	}
	peer, err := netip.ParseAddrPort(line[:len(line)-1])
	if err != nil {
		b.Fatal(err)
	}
	tr, err := benchTransport(transport)
	if err != nil {
		b.Fatal(err)
	}
	return func(o order) Conn {
		c, err := tr.Dial(b.Context(), loop4, peer)
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() { _ = c.Close() })
		if err := writeAll(c, o.encode()); err != nil {
			b.Fatal(err)
		}
		return c
	}
}

// transfer writes out and then reads in, polling or sleeping in between.
func transfer(c Conn, out [][]byte, in []byte, poll bool) error {
	for i := range out {
		for done := 0; done < len(out[i]); {
			var n int
			var err error
			if done == 0 {
				n, err = c.TryWrite(out[i : i+1])
			} else {
				n, err = c.TryWrite([][]byte{out[i][done:]})
			}
			if err != nil {
				return err
			}
			if done += n; n == 0 && !poll {
				if err := c.Wait(true, patience); err != nil {
					return err
				}
			}
		}
	}
	for len(in) > 0 {
		n, err := c.TryRead(in)
		if err != nil {
			return err
		}
		if in = in[n:]; n == 0 && !poll {
			if err := c.Wait(false, time.Second); err != nil {
				return err
			}
		}
	}
	return nil
}
