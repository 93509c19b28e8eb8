package replicate_test

import (
	"encoding/binary"
	"strings"
	"testing"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// A segment that is not the next one of this log, or whose body does not match the
// checksum in its header though each piece matches its own (memory may flip at the
// source behind a piece's sum), is never acknowledged, whichever way it comes.
func TestSegmentThatDoesNotBelong(t *testing.T) {
	le := binary.LittleEndian
	for wrong, change := range map[string]func(h []byte){
		"body":  func(h []byte) { le.PutUint32(h[52:], le.Uint32(h[52:])^1) },
		"chain": func(h []byte) { le.PutUint32(h[48:], 1) },
		"epoch": func(h []byte) { le.PutUint64(h[16:], enemyEpoch.Counter+1) },
		"hint":  func(h []byte) { le.PutUint64(h[32:], 1<<20) },
	} {
		for _, way := range []string{"short", "frames", "lanes"} {
			t.Run(wrong+" "+way, func(t *testing.T) {
				v := newVictim(t, nvmmirror.Alone)
				main := v.connect(1 << 20)
				session, ok := asSource(main)
				if !ok {
					t.Skip("the handshake of an honest peer failed")
				}
				size := volumeSize / 4
				if way == "short" {
					size = 32 << 10
				}
				var body []byte
				for off := 0; off < size; off += 32 << 10 {
					body = append(body, record(uint64(off), 32<<10, 1)...)
				}
				seg, _ := segment(0, 0, body)
				change(seg)
				le.PutUint32(seg[60:], crc32c.Sum(seg[:60]))
				p := main
				if way == "lanes" {
					p = v.connect(1 << 20)
					p.send(replicate.Message{Type: replicate.TypeLane, Session: session}.Encode())
					if _, ok := p.await(replicate.TypeLane); !ok {
						t.Skip("no lane")
					}
					main.send(replicate.Message{Type: replicate.TypeSpread, Session: session, A: 0, Body: seg[:64]}.Encode())
				}
				if way == "short" {
					main.send(seg)
				} else {
					for at := 0; at < len(seg); at += replicate.MaxFrame {
						p.send(replicate.Message{Type: replicate.TypeFrame, Session: session, A: uint64(at), Body: seg[at:min(at+replicate.MaxFrame, len(seg))]}.Encode())
					}
				}
				for {
					m, ok := main.receive()
					if !ok || m.Type == replicate.TypeResend {
						break
					}
					if m.Type == replicate.TypeAck && m.A > 0 {
						t.Fatalf("acknowledged up to %d", m.A)
					}
				}
				main.hangUp()
				v.survives(false)
			})
		}
	}
}

// Announced segments take their place in the ring before they have arrived. More of
// them than it has room for end the session: they would lie over log that is not
// applied.
func TestMoreSegmentsThanRoom(t *testing.T) {
	v := newVictim(t, nvmmirror.Alone)
	p := v.connect(1 << 20)
	session, ok := asSource(p)
	if !ok {
		t.Fatal("the handshake of an honest peer failed")
	}
	const length = ringSize / 4
	body := record(0, length-64-16, 1)
	for lsn, chain := uint64(0), uint32(0); lsn <= ringSize; lsn += length {
		var seg []byte
		seg, chain = segment(lsn, chain, body)
		p.send(replicate.Message{Type: replicate.TypeSpread, Session: session, A: lsn, Body: seg[:64]}.Encode())
	}
	const want = "where the ring has room up to 2097152"
	if m, ok := p.await(replicate.TypeBye); !ok || !strings.Contains(string(m.Body), want) {
		t.Errorf("the session ended with %q, want %q", m.Body, want)
	}
	p.hangUp()
	v.survives(false)
}
