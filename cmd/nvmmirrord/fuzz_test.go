package main

import (
	"bytes"
	"strings"
	"testing"
)

// FuzzSize: a size that is taken is what it says, and is written so that it
// can be read again.
func FuzzSize(f *testing.F) {
	for _, s := range []string{"0", "4096", "64KiB", "1GiB", "8388607TiB", "9223372036854775807", "1B", "KiB", "-1", "0x10", "1 MiB", "+1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		var s size
		if err := s.Set(text); err != nil {
			if s != 0 {
				t.Fatalf("%q: %d along with %v", text, s, err)
			}
			return
		}
		if s < 0 || strings.Trim(text, "0123456789KMGTiB") != "" {
			t.Fatalf("%q became %d", text, s)
		}
		var again size
		if err := again.Set(s.String()); err != nil || again != s {
			t.Fatalf("%q became %v, and that %v (%v)", text, &s, &again, err)
		}
	})
}

// FuzzJournalLines prints what a daemon answers, whatever it is, and however it
// is cut into pieces: the same each time.
func FuzzJournalLines(f *testing.F) {
	const segment = `{"lsn":64,"end":192,"offset":4194368,"bytes":128,"kind":"data","epoch":{"counter":1,"node":2},"transactions":1,"acked_hint":0,"crc":"1","body_crc":"2","prev_crc":"3","state":"ok","problems":["p"],"records":[{"transaction":1,"offset":5,"length":3,"data":"616263"}]}` + "\n"
	const stop = `{"stop":{"from":0,"end":192,"acked_lsn":64,"ending":"live","reason":"it goes on","segments":1,"transactions":1,"unreachable":0,"damaged":false}}` + "\n"
	f.Add([]byte(segment+stop), uint8(7), true)
	f.Add([]byte(segment+stop), uint8(100), false)
	f.Add([]byte("{}\nnull\n{\"stop\":{}}\n"), uint8(1), false)
	f.Add([]byte(stop+"{\"stop\":null,\"lsn\":-1}\n"), uint8(3), true)
	f.Fuzz(func(t *testing.T, answer []byte, piece uint8, asJSON bool) {
		var whole, pieces bytes.Buffer
		one := &journalPrinter{w: &whole, json: asJSON}
		_, err := one.Write(answer)
		many := &journalPrinter{w: &pieces, json: asJSON}
		var pieceErr error
		for rest := answer; len(rest) > 0 && pieceErr == nil; {
			n := min(len(rest), 1+int(piece))
			_, pieceErr = many.Write(rest[:n])
			rest = rest[n:]
		}
		if (err == nil) != (pieceErr == nil) || !bytes.Equal(whole.Bytes(), pieces.Bytes()) {
			t.Fatalf("whole: %v\n%s\nin pieces of %d: %v\n%s", err, &whole, 1+int(piece), pieceErr, &pieces)
		}
		if err != nil {
			return
		}
		a, b := one.verdict(), many.verdict()
		if (a == nil) != (b == nil) || exitCode(a) != exitCode(b) {
			t.Fatalf("%v and %v", a, b)
		}
	})
}
