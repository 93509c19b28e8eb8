package replicate_test

import (
	"context"
	"encoding/binary"
	"testing"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// FuzzLanes lets a hostile primary that has the key do anything with the
// connections for long segments: announce and not send, send and not
// announce, twice, elsewhere, with wrong sums and lengths, or anything else.
func FuzzLanes(f *testing.F) {
	f.Add([]byte{0, 1, 0x10, 2, 0x11, 3, 0x12, 4, 0x13, 5, 0x14})       // whole, in order
	f.Add([]byte{4, 0x13, 3, 0x12, 2, 0x11, 1, 0x10, 0, 5, 0x14})       // pieces first
	f.Add([]byte{0, 0x10, 0x10, 0x10, 0x20, 0x30, 0x40, 0x50})          // twice, bad sum, elsewhere
	f.Add([]byte{0, 0x60, 0x70, 0x80, 0x90})                            // lengths, types, bytes
	f.Add([]byte{0, 0xa0, 0x10, 0x11, 0x12, 0x13, 0x14, 0, 0x10, 0x1f}) // another lane, again
	f.Fuzz(func(t *testing.T, prog []byte) {
		v := newVictim(t, nvmmirror.Alone)
		main := v.connect(1 << 20)
		session, ok := asSource(main)
		if !ok {
			t.Fatal("the handshake of an honest peer failed")
		}
		lane := func() *pipe {
			p := v.connect(1 << 20)
			p.send(replicate.Message{Type: replicate.TypeLane, Session: session}.Encode())
			p.await(replicate.TypeLane)
			return p
		}
		p := lane()
		all := []*pipe{main, p}
		const piece = replicate.MaxFrame
		var body []byte
		for off := 0; off < volumeSize/4; off += 32 << 10 {
			r := record(uint64(off), 32<<10, 1)
			r[100] = byte(off >> 10)
			body = append(body, r...)
		}
		seg, _ := segment(0, 0, body)
		for _, op := range prog[:min(len(prog), 40)] {
			i := int(op & 15)
			at := min(i*piece, len(seg)-64)
			part := seg[at:min(at+piece, len(seg))]
			m := replicate.Message{Type: replicate.TypeFrame, Session: session, A: uint64(at), Body: part}
			switch op >> 4 {
			case 0:
				main.send(replicate.Message{Type: replicate.TypeSpread, Session: session, A: 0, Body: seg[:64]}.Encode())
			case 1:
				p.send(m.Encode())
			case 2:
				b := m.Encode()
				b[len(b)-1] ^= 1
				p.send(b)
			case 3:
				m.A += 64
				p.send(m.Encode())
			case 4:
				m.A = ^uint64(0) &^ 63
				p.send(m.Encode())
			case 5:
				m.A = 1 << 40
				p.send(m.Encode())
			case 6:
				m.Body = part[:len(part)-8]
				p.send(m.Encode())
			case 7:
				m.Type = uint16(i) + 1
				p.send(m.Encode())
			case 8:
				p.send(part[:64])
			case 9:
				m.Session++
				p.send(m.Encode())
			case 10:
				p = lane()
				all = append(all, p)
			case 11:
				p.hangUp()
			case 12: // another header in the first piece than was announced
				b := append([]byte(nil), part...)
				binary.LittleEndian.PutUint64(b[32:], 64)
				binary.LittleEndian.PutUint32(b[60:], crc32c.Sum(b[:60]))
				m.Body = b
				p.send(m.Encode())
			}
		}
		for _, p := range all {
			p.taken()
			p.hangUp()
		}
		v.survives(false)
	})
}

// TestLaneOfNoSession: a connection that asks to be a lane of a session that
// does not run is refused, and disturbs nothing.
func TestLaneOfNoSession(t *testing.T) {
	v := newVictim(t, nvmmirror.Alone)
	if err := v.Promote(context.Background(), true); err != nil {
		t.Fatal(err)
	}
	p := v.connect(1 << 20)
	p.send(replicate.Message{Type: replicate.TypeLane, Session: 12345}.Encode())
	if _, ok := p.receive(); ok {
		t.Error("it was answered")
	}
	p.hangUp()
	v.survives(true)
}
