package replicate_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// enemy is the peer's identity.
func enemy() replicate.Side {
	return replicate.Side{Node: 0xe, Geometry: replicate.Geometry{Size: volumeSize, Journal: ringSize, Block: replicate.BlockSize}}
}

// handshake goes through the handshake as an honest peer with this side would.
func handshake(p *pipe, side replicate.Side) (session uint64, theirs replicate.Side, ok bool) {
	body, _ := json.Marshal(replicate.HelloBody{Side: side, Session: 5, Lanes: 2})
	p.send(replicate.Message{Type: replicate.TypeHello, Body: body}.Encode())
	m, ok := p.await(replicate.TypeHello)
	if !ok {
		return 0, theirs, false
	}
	var h replicate.HelloBody
	if json.Unmarshal(m.Body, &h) != nil {
		return 0, theirs, false
	}
	session = 5 ^ h.Session | 1
	common := replicate.CommonOf(side, h.Side)
	if m, ok = p.await(replicate.TypeChain); !ok {
		return 0, theirs, false
	}
	theirs = h.Side
	theirs.Chain, theirs.Known = uint32(m.B), m.C == 1
	side.Known = true
	p.send(replicate.Message{Type: replicate.TypeChain, Session: session, A: uint64(common), C: 1}.Encode())
	v := replicate.Decide(side, theirs)
	p.send(replicate.Message{Type: replicate.TypeVerdict, Session: session, Body: replicate.VerdictBody(v)}.Encode())
	_, ok = p.await(replicate.TypeVerdict)
	return session, theirs, ok
}

// asFollower joins a primary as its secondary.
func asFollower(p *pipe) (session uint64, end uint64, ok bool) {
	session, _, ok = handshake(p, enemy())
	if !ok {
		return 0, 0, false
	}
	m, ok := p.await(replicate.TypeFollow)
	if !ok {
		return 0, 0, false
	}
	var f replicate.FollowBody
	json.Unmarshal(m.Body, &f)
	p.send(replicate.Message{Type: replicate.TypeFollowed, Session: session, A: uint64(f.From)}.Encode())
	return session, uint64(f.From), true
}

var enemyEpoch = journal.Epoch{Counter: 1, Node: 0xe}

// asSource makes a blank node follow.
func asSource(p *pipe) (session uint64, ok bool) {
	side := enemy()
	side.Lineage, side.Role = replicate.UUID{9}, replicate.Primary
	side.History = journal.History{{Epoch: enemyEpoch, PeerIn: true}}
	session, _, ok = handshake(p, side)
	if !ok {
		return 0, false
	}
	body, _ := json.Marshal(replicate.FollowBody{Lineage: side.Lineage, History: side.History, LeaseNS: 1e6})
	p.send(replicate.Message{Type: replicate.TypeFollow, Session: session, Body: body}.Encode())
	_, ok = p.await(replicate.TypeFollowed)
	return session, ok
}

// segment is a segment with right checksums, and anything in it.
func segment(lsn uint64, prev uint32, body []byte) (b []byte, crc uint32) {
	n := (64 + len(body) + 63) &^ 63
	b = make([]byte, n)
	copy(b[64:], body)
	le := binary.LittleEndian
	copy(b, "NVMS")
	le.PutUint16(b[4:], journal.Version)
	le.PutUint16(b[6:], 1)
	le.PutUint64(b[8:], lsn)
	le.PutUint64(b[16:], enemyEpoch.Counter)
	le.PutUint64(b[24:], enemyEpoch.Node)
	le.PutUint32(b[40:], uint32(n))
	le.PutUint32(b[44:], 1)
	le.PutUint32(b[48:], prev)
	le.PutUint32(b[52:], crc32c.Sum(b[64:]))
	crc = crc32c.Sum(b[:60])
	le.PutUint32(b[60:], crc)
	return b, crc
}

func record(off uint64, n, flags uint32) []byte {
	b := make([]byte, 16+(int(n)+7)&^7)
	binary.LittleEndian.PutUint64(b, off)
	binary.LittleEndian.PutUint32(b[8:], n)
	binary.LittleEndian.PutUint32(b[12:], flags)
	return b
}

// A script drives a connection: each step is an operation and what it needs,
// taken from the fuzzer's bytes.
func script(p *pipe, session uint64, prog []byte) {
	take := func(n int) []byte {
		n = min(n, len(prog))
		b := prog[:n]
		prog = prog[n:]
		return b
	}
	number := func() uint64 {
		b := take(1)
		if len(b) == 0 {
			return 0
		}
		switch k := b[0] % 8; k {
		case 0:
			return 0
		case 1:
			return ^uint64(0)
		case 2:
			return 1 << 63
		case 3:
			return ringSize
		default:
			var w [8]byte
			copy(w[:], take(2))
			return binary.LittleEndian.Uint64(w[:]) << (6 * (k - 4))
		}
	}
	var lsn uint64
	var chain uint32
	for steps := 0; len(prog) > 0 && steps < 64; steps++ {
		switch op := take(1)[0]; op % 8 {
		case 0, 1, 2, 3: // a message
			m := replicate.Message{Type: uint16(op/8)%replicate.TypeLast + 1, Session: session, A: number(), B: number(), C: number(), D: number()}
			m.Body = take(int(number() % 512))
			p.send(m.Encode())
		case 4: // bytes
			p.send(take(1 + int(number()%256)))
		case 5: // a message with a body that is not the one promised
			b := replicate.Message{Type: uint16(op/8)%replicate.TypeLast + 1, Session: session, A: number(), Body: take(int(number() % 512))}.Encode()
			b[len(b)-1] ^= 1
			p.send(b)
		case 6: // a segment where one is due
			b, crc := segment(lsn, chain, take(int(number()%1024)))
			p.send(b)
			lsn, chain = lsn+uint64(len(b)), crc
		case 7: // a segment out of place
			b, _ := segment(number()&^63, uint32(number()), take(int(number()%256)))
			p.send(b)
		}
	}
	p.taken()
}

// survives checks that the node still works after its peer did its worst.
func (v *victim) survives(primary bool) {
	t := v.t
	t.Helper()
	if primary {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		tx := v.Begin()
		tx.Write(100, []byte("still there"))
		if _, err := tx.Commit(ctx); err != nil {
			t.Fatalf("commit: %v", err)
		}
	}
	for range 2 {
		if primary {
			b := make([]byte, 11)
			deadline := time.Now().Add(10 * time.Second)
			for {
				_, err := v.ReadAt(b, 100)
				if err == nil {
					break
				}
				if !errors.Is(err, nvmmirror.ErrNoLease) || time.Now().After(deadline) {
					t.Fatalf("read: %v", err)
				}
				time.Sleep(time.Millisecond)
			}
			if string(b) != "still there" {
				t.Fatalf("read %q", b)
			}
		}
		if s := v.Status(); len(s.Degraded) > 0 {
			for _, d := range s.Degraded {
				if bytes.Contains([]byte(d), []byte("persistence failed")) {
					t.Fatal(d)
				}
			}
		}
		if err := v.Close(); err != nil {
			t.Fatal(err)
		}
		v.open()
	}
}

// FuzzSession lets a hostile peer that has the key do anything: at the door,
// as the follower of a primary, and as the primary of a blank node. The node
// survives it, and what was acknowledged is there.
func FuzzSession(f *testing.F) {
	f.Add(byte(0), []byte("anything at all"))
	f.Add(byte(1), []byte{7 * 8, 4, 64, 0, 0, 0, 0})
	f.Add(byte(1), []byte{13 * 8, 4, 1, 0, 0, 0, 0, 8 * 8, 1, 1, 1, 1, 0})
	f.Add(byte(2), append([]byte{6, 4, 32, 0}, record(0, 8, 1)...))
	f.Add(byte(2), append([]byte{6, 4, 32, 0}, record(1<<40, 8, 1)...))
	f.Add(byte(2), append([]byte{6, 4, 32, 0}, record(volumeSize-4, 8, 1)...))
	f.Fuzz(func(t *testing.T, role byte, prog []byte) {
		primary := role%3 == 1
		var v *victim
		var p *pipe
		var session uint64
		for try, ok := 0, false; !ok; try++ {
			if try == 20 { // the peer may be slower than the timeout on a busy machine
				t.Fatal("the handshake of an honest peer failed each time")
			}
			v = newVictim(t, nvmmirror.Alone)
			if primary {
				if err := v.Promote(context.Background(), true); err != nil {
					t.Fatal(err)
				}
			}
			p = v.connect(1 << 20)
			switch role % 3 {
			case 0:
				ok = true
			case 1:
				session, _, ok = asFollower(p)
			case 2:
				session, ok = asSource(p)
			}
		}
		script(p, session, prog)
		p.hangUp()
		v.survives(primary)
	})
}

// A peer in sync asks for blocks, and never reads: what is queued for it stays
// bounded, and its session ends.
func TestPeerThatNeverReads(t *testing.T) {
	v := newVictim(t, nvmmirror.Alone)
	if err := v.Promote(context.Background(), true); err != nil {
		t.Fatal(err)
	}
	flooded := func() bool {
		p := v.connect(64 << 10)
		defer p.hangUp()
		session, _, ok := asFollower(p)
		if !ok {
			return false
		}
		if _, ok := p.await(replicate.TypeJoin); !ok {
			return false
		}
		p.send(replicate.Message{Type: replicate.TypeJoined, Session: session}.Encode())
		for deadline := time.Now().Add(time.Second); v.Status().Peer != "in-sync"; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				return false
			}
		}
		flood := bytes.Repeat(replicate.Message{Type: replicate.TypeRequest, Session: session, A: 1}.Encode(), 1000)
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		for range 40 { // 160 MiB of answers
			p.send(flood)
			p.taken()
		}
		runtime.GC()
		runtime.ReadMemStats(&after)
		if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 16<<20 {
			t.Fatalf("the heap grew by %d bytes", grown)
		}
		for deadline := time.Now().Add(5 * time.Second); v.Status().Peer == "in-sync"; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the session goes on")
			}
		}
		return strings.Contains(v.Status().Reason, "does not read")
	}
	// Where the machine is too busy for the node's timeout, it tries again.
	for try := 0; !flooded(); try++ {
		if try == 20 {
			t.Fatalf("no session ended for it: %+v", v.Status())
		}
	}
	v.survives(true)
}

// A primary whose peer holds the title, and comes back: as long as the peer has
// not answered, it may already be on its way to promotion, having waited out a
// lease that it knows of. Nothing may be read before the answer.
func TestNoLeaseBeforeTheAnswer(t *testing.T) {
	v := newVictim(t, nvmmirror.Block)
	if err := v.Promote(context.Background(), true); err != nil {
		t.Fatal(err)
	}
	p := v.connect(1 << 20)
	session, _, ok := asFollower(p)
	if !ok {
		t.Fatal("handshake")
	}
	m, ok := p.await(replicate.TypeJoin)
	if !ok {
		t.Fatal("not asked to join")
	}
	var j replicate.JoinBody
	if err := json.Unmarshal(m.Body, &j); err != nil || j.Title != "take" {
		t.Fatalf("%s: %v", m.Body, err)
	}
	p.send(replicate.Message{Type: replicate.TypeJoined, Session: session}.Encode())
	poll := func(what string, ok func(err error) bool) {
		t.Helper()
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(time.Millisecond) {
			_, err := v.ReadAt(make([]byte, 1), 0)
			if ok(err) {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("not %s: %v", what, err)
			}
		}
	}
	poll("read", func(err error) bool { return err == nil })
	p.hangUp()
	poll("refused", func(err error) bool { return errors.Is(err, nvmmirror.ErrNoLease) })

	side := enemy()
	side.Lineage, side.History, side.Title = v.Status().Lineage, j.History, true
	p = v.connect(1 << 20)
	if session, _, ok = handshake(p, side); !ok {
		t.Fatal("handshake")
	}
	if _, ok = p.await(replicate.TypeFollow); !ok {
		t.Fatal("not told to follow")
	}
	p.send(replicate.Message{Type: replicate.TypeFollowed, Session: session}.Encode())
	if _, ok = p.await(replicate.TypeJoin); !ok {
		t.Fatal("not asked to join")
	}
	if _, err := v.ReadAt(make([]byte, 1), 0); !errors.Is(err, nvmmirror.ErrNoLease) {
		t.Fatalf("read before the peer answered: %v", err)
	}
	p.hangUp()
}

// A connection that sends a byte at a time, for ever, must not keep others out.
func TestTricklingConnections(t *testing.T) {
	v := newVictim(t, nvmmirror.Alone)
	if err := v.Promote(context.Background(), true); err != nil {
		t.Fatal(err)
	}
	hello := replicate.Message{Type: replicate.TypeHello, Body: make([]byte, 100000)}.Encode()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		p := v.connect(64 << 10)
		wg.Go(func() {
			for _, b := range hello {
				select {
				case <-stop:
					return
				case <-time.After(10 * time.Millisecond):
					p.send([]byte{b})
				}
			}
		})
	}
	defer wg.Wait()
	defer close(stop)
	for deadline := time.Now().Add(5 * time.Second); ; {
		p := v.connect(1 << 20)
		if _, _, ok := asFollower(p); ok {
			p.hangUp()
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the peer does not get in")
		}
	}
}

// The checksum before the log's end is told to a peer while committers move
// the end: it must be that of the LSN that was asked for.
func TestHandshakeUnderLoad(t *testing.T) {
	v := newVictim(t, nvmmirror.Alone)
	if err := v.Promote(context.Background(), true); err != nil {
		t.Fatal(err)
	}
	p := v.connect(1 << 20)
	side := enemy()
	if _, _, ok := handshake(p, side); !ok {
		t.Fatal("handshake")
	}
	m, ok := p.await(replicate.TypeFollow)
	if !ok {
		t.Fatal("not told to follow")
	}
	var f replicate.FollowBody
	if err := json.Unmarshal(m.Body, &f); err != nil {
		t.Fatal(err)
	}
	p.hangUp()
	side.Lineage, side.History = f.Lineage, f.History
	side.End = 1 << 40 // so that the node's own end is what they have in common

	stop := make(chan struct{})
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					v.WriteAt([]byte("load"), int64(g)*100)
				}
			}
		})
	}
	for range 50 {
		p := v.connect(1 << 20)
		handshake(p, side)
		p.hangUp()
	}
	close(stop)
	wg.Wait()
}

// A full copy is whole once all its blocks came, in order, and the log that they hold.
func TestWholeCopy(t *testing.T) {
	const total, at = volumeSize / replicate.BlockSize, 8
	zero := make([]byte, replicate.BlockSize)
	blocks := func(session, first uint64) []byte {
		info := make([]byte, 16)
		binary.LittleEndian.PutUint32(info[8:], crc32c.Sum(zero))
		body := append(bytes.Repeat(info, at), bytes.Repeat(zero, at)...)
		return replicate.Message{Type: replicate.TypeBlocks, Session: session, A: first, B: at, Body: body}.Encode()
	}
	seg, _ := segment(0, 0, record(0, 100, 1))
	for _, c := range []struct {
		name       string
		skip       uint64 // blocks from here on are left out,
		instead    bool   // and the first come again
		log, whole bool
	}{
		{"whole", total, false, true, true},
		{"without its log", total, false, false, false},
		{"with others instead", 3 * at, true, true, false},
		{"without the last blocks", total - at, false, true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			v := newVictim(t, nvmmirror.Alone)
			p := v.connect(4 << 20)
			side := enemy()
			side.Lineage, side.Role = replicate.UUID{9}, replicate.Primary
			side.History = journal.History{{Epoch: enemyEpoch, PeerIn: true}}
			session, _, ok := handshake(p, side)
			if !ok {
				t.Fatal("no handshake")
			}
			body, _ := json.Marshal(replicate.FollowBody{Lineage: side.Lineage, History: side.History, Full: true, LeaseNS: 1e6})
			p.send(replicate.Message{Type: replicate.TypeFollow, Session: session, Body: body}.Encode())
			if _, ok := p.await(replicate.TypeFollowed); !ok {
				t.Fatal("it does not follow")
			}
			for b := uint64(0); b < total; b += at {
				switch {
				case b != c.skip:
					p.send(blocks(session, b))
				case c.instead:
					p.send(blocks(session, 0))
				}
			}
			p.send(replicate.Message{Type: replicate.TypeBlocksDone, Session: session, A: uint64(len(seg))}.Encode())
			if c.log {
				p.send(seg)
			}
			if m, whole := p.await(replicate.TypeFollowed); whole != c.whole || whole && m.A != uint64(len(seg)) {
				t.Errorf("whole: %v, %+v", whole, m)
			}
			p.hangUp()
			v.survives(false)
		})
	}
}
