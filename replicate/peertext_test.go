package replicate_test

import (
	"bytes"
	"context"
	"encoding/json"
	"strings"
	"testing"
	"time"
	"unicode"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// What a peer says is shown in logs, status and on terminals: a broken one could fill
// those with 256 KiB at a time, or have them do what an escape sequence asks for.
func TestPeersTextIsBoundedAndPrintable(t *testing.T) {
	var v *victim
	// Of 80 KiB; where a session works, 10: a longer message than 16 KiB is an error there.
	text := func(mark string) []byte {
		return append([]byte(mark), bytes.Repeat([]byte("\x1b[2J\r\n\xff\u202e"), 8<<10)...)
	}
	bye := func(p *pipe, session uint64, text []byte) {
		p.send(replicate.Message{Type: replicate.TypeBye, Session: session, Body: text}.Encode())
	}
	greet := func(p *pipe) (h replicate.HelloBody) {
		body, _ := json.Marshal(replicate.HelloBody{Side: enemy(), Session: 5})
		p.send(replicate.Message{Type: replicate.TypeHello, Body: body}.Encode())
		m, _ := p.await(replicate.TypeHello)
		if err := json.Unmarshal(m.Body, &h); err != nil {
			t.Fatal(err)
		}
		return h
	}
	// A dial that fails meanwhile is the reason next: it is said until it is seen.
	shows := func(mark string, say func(p *pipe, mark string)) {
		t.Helper()
		for range 20 {
			say(v.connect(1<<20), mark)
			for deadline := time.Now().Add(200 * time.Millisecond); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
				if reason := v.Status().Reason; strings.Contains(reason, mark) {
					wantPrintable(t, mark, reason)
					return
				}
			}
		}
		t.Fatalf("%s: the reason is %.200q", mark, v.Status().Reason)
	}
	v = newVictim(t, nvmmirror.Block)
	for _, c := range []struct {
		mark string
		say  func(p *pipe, mark string)
	}{
		{"in the place of a hello", func(p *pipe, mark string) { bye(p, 0, text(mark)) }},
		{"role in a hello", func(p *pipe, mark string) {
			body, _ := json.Marshal(map[string]string{"role": string(text(mark))})
			p.send(replicate.Message{Type: replicate.TypeHello, Body: body}.Encode())
		}},
		{"in the place of a chain", func(p *pipe, mark string) {
			bye(p, 5^greet(p).Session|1, text(mark))
		}},
		{"rule of a verdict", func(p *pipe, mark string) {
			h := greet(p)
			session := 5 ^ h.Session | 1
			p.send(replicate.Message{Type: replicate.TypeChain, Session: session, A: uint64(replicate.CommonOf(enemy(), h.Side)), C: 1}.Encode())
			p.send(replicate.Message{Type: replicate.TypeVerdict, Session: session, Body: replicate.VerdictBody(replicate.Verdict{Rule: replicate.Rule(text(mark))})}.Encode())
		}},
		{"on an idle session", func(p *pipe, mark string) {
			session, _, _ := handshake(p, enemy())
			bye(p, session, text(mark)[:10<<10])
		}},
		{"of a follower", func(p *pipe, mark string) {
			if err := v.Promote(context.Background(), true); err != nil {
				t.Fatal(err)
			}
			session, _, _ := asFollower(p)
			bye(p, session, text(mark)[:10<<10])
		}},
	} {
		shows(c.mark, c.say)
	}
	v = newVictim(t, nvmmirror.Block)
	shows("of a primary", func(p *pipe, mark string) {
		session, _ := asSource(p)
		bye(p, session, text(mark)[:10<<10])
	})
}

// A peer that shakes hands and goes, again and again, does not fill the log: it has
// the handshake once for each rule and peer, until a session has worked.
func TestRepeatedHandshakesAreLoggedOnce(t *testing.T) {
	v := newVictim(t, nvmmirror.Block)
	v.Close()
	core, logged := observer.New(zap.InfoLevel)
	v.log = zap.New(core)
	v.open()
	shake := func(node uint64, stay time.Duration) {
		t.Helper()
		side := enemy()
		side.Node = node
		p := v.connect(1 << 20)
		session, _, ok := handshake(p, side)
		if !ok {
			t.Fatal("handshake")
		}
		for end := time.Now().Add(stay); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
			p.send(replicate.Message{Type: replicate.TypeHeartbeat, Session: session}.Encode())
		}
		p.hangUp()
		p.await(replicate.TypeBye) // which does not come: until the node has closed it, too
	}
	want := func(n int) {
		t.Helper()
		if got := logged.FilterMessage("handshake").Len(); got != n {
			t.Fatalf("%d handshakes are logged, not %d: %v", got, n, logged.All())
		}
	}
	for range 20 {
		shake(0xe, 0)
	}
	want(1)
	shake(0xf, 0)
	want(2)
	shake(0xf, 250*time.Millisecond) // twice the timeout and more
	want(2)
	shake(0xf, 0)
	want(3)
}

func wantPrintable(t *testing.T, what, text string) {
	t.Helper()
	if len(text) > 2<<10+200 || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }) {
		t.Errorf("%s: %d bytes, %.200q", what, len(text), text)
	}
}
