package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"
)

// A transaction whose outcome is unknown is over for its caller, though not for
// the committer: what the caller does with it next, as a deferred Discard, must
// not touch the request that waits there.
func TestUnknownOutcomeEndsTheTransaction(t *testing.T) {
	t.Parallel()
	for name, after := range map[string]func(*testing.T, Tx){
		"discard": func(_ *testing.T, tx Tx) { tx.Discard() },
		"write": func(t *testing.T, tx Tx) {
			if err := tx.Write(0, []byte("x")); !errors.Is(err, ErrClosed) {
				t.Errorf("write: %v", err)
			}
		},
		"commit": func(t *testing.T, tx Tx) {
			if _, err := tx.Commit(context.Background()); !errors.Is(err, ErrClosed) {
				t.Errorf("commit: %v", err)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			a, b := pairInSync(t, testConfig{})
			b.wire.link.set(true)
			a.peerIs("lost")
			for range 2 {
				ctx, cancel := context.WithTimeout(context.Background(), time.Millisecond)
				tx := a.Begin()
				if err := tx.Write(0, []byte("first")); err != nil {
					t.Fatal(err)
				}
				if _, err := tx.Commit(ctx); !errors.Is(err, ErrOutcomeUnknown) {
					t.Fatal(err)
				}
				cancel()
				after(t, tx)
			}
			second := make(chan error, 8)
			for i := range cap(second) {
				tx := a.Begin()
				if err := tx.Write(int64(i+1)*blockSize, []byte("second")); err != nil {
					t.Fatal(err)
				}
				go func() { // as a caller would
					defer tx.Discard()
					_, err := tx.Commit(context.Background())
					second <- err
				}()
			}
			b.wire.link.set(false)
			for range cap(second) {
				select {
				case err := <-second:
					if err != nil {
						t.Fatal(err)
					}
				case <-time.After(10 * time.Second):
					t.Fatal("the committer hangs")
				}
			}
			a.inSync()
			for i := range cap(second) + 1 {
				want := []byte("second")
				if i == 0 {
					want = []byte("first\x00")
				}
				got := make([]byte, len(want))
				if _, err := a.ReadAt(got, int64(i)*blockSize); err != nil || !bytes.Equal(got, want) {
					t.Errorf("block %d holds %q: %v", i, got, err)
				}
			}
		})
	}
}
