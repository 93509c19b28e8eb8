package nvmmirror

import (
	"context"
	"errors"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/pmem"
)

// openStandalone opens a new region of its own.
func openStandalone(t *testing.T) *Volume {
	t.Helper()
	path := filepath.Join(shm(t), "r")
	if err := Create(path, CreateOptions{Size: smallSize, JournalSize: smallJournal, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
	v, err := Open(path, Options{Logger: nopLogger})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.Close() })
	return v
}

// TestReadBesideClose: a reader that has met a damaged block looks at it again
// when the mapping may be gone.
func TestReadBesideClose(t *testing.T) {
	rounds := 100
	if testing.Short() {
		rounds = 20
	}
	for range rounds {
		v := openStandalone(t)
		v.mem.Bytes()[v.data.Off+7] ^= 1
		started := make(chan struct{}, 4)
		var readers sync.WaitGroup
		for range 4 {
			readers.Go(func() {
				p := make([]byte, 100)
				for first := true; ; first = false {
					_, err := v.ReadAt(p, 0)
					var corrupt *CorruptError
					if first {
						started <- struct{}{}
					}
					if errors.Is(err, ErrClosed) {
						return
					}
					if !errors.As(err, &corrupt) {
						t.Errorf("a damaged block: %v", err)
						return
					}
				}
			})
		}
		<-started
		v.Close()
		readers.Wait()
	}
}

// TestRolesBesideClose: who changes the role meanwhile, or afterwards, meets a
// closed volume and not a mapping that is gone.
func TestRolesBesideClose(t *testing.T) {
	rounds := 100
	if testing.Short() {
		rounds = 20
	}
	ctx := context.Background()
	for round := range rounds {
		v := openStandalone(t)
		var others sync.WaitGroup
		for _, f := range []func() error{
			func() error { return v.Demote(ctx) },
			func() error { return v.Promote(ctx, true) },
			func() error { return v.ContinueAlone(ctx, true) },
			v.Close,
		} {
			others.Go(func() {
				for range round {
					runtime.Gosched()
				}
				if err := f(); err != nil && !errors.Is(err, ErrClosed) && !errors.As(err, new(*ErrNotPrimary)) {
					t.Error(err)
				}
			})
		}
		if err := v.Close(); err != nil {
			t.Error(err)
		}
		others.Wait()
		if _, err := v.WriteAt([]byte("x"), 0); !errors.Is(err, ErrClosed) && !errors.As(err, new(*ErrNotPrimary)) {
			t.Errorf("a commit afterwards: %v", err)
		}
		if err := v.Demote(ctx); err != nil && !errors.Is(err, ErrClosed) {
			t.Errorf("a demotion afterwards: %v", err)
		}
	}
}

// TestCommitThatWaitsForServiceIsClosed: a primary that waits for its peer takes
// transactions, and refuses them when it is closed.
func TestCommitThatWaitsForServiceIsClosed(t *testing.T) {
	a, b := pairInSync(t, testConfig{opt: Options{OnPeerLoss: Block}})
	b.close()
	a.close()
	a.open()
	v := a.Volume
	done := begin(context.Background(), a, 0, []byte("x"))
	a.close()
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Errorf("a commit that waits: %v", err)
	}
	if _, err := v.WriteAt([]byte("x"), 0); !errors.Is(err, ErrClosed) {
		t.Errorf("a commit afterwards: %v", err)
	}
	if err := v.ContinueAlone(context.Background(), true); !errors.Is(err, ErrClosed) {
		t.Errorf("going on alone afterwards: %v", err)
	}
}

// What is asked of a closed volume is answered by ErrClosed, with its path.
func TestClosedVolumeSaysSo(t *testing.T) {
	v := openStandalone(t)
	v.Close()
	ctx := context.Background()
	_, read := v.ReadAt(make([]byte, 1), 0)
	_, beyond := v.ReadAt(make([]byte, 1), v.Size())
	_, write := v.WriteAt([]byte("x"), 0)
	for what, err := range map[string]error{
		"read": read, "read beyond the end": beyond, "write": write,
		"promote": v.Promote(ctx, true), "demote": v.Demote(ctx), "continue alone": v.ContinueAlone(ctx, true),
	} {
		if !errors.Is(err, ErrClosed) || !strings.Contains(err.Error(), v.path) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestCommitWithoutContext: a nil context is refused before the transaction is queued.
// A caller that panicked while it waited would take the driver's role with it.
func TestCommitWithoutContext(t *testing.T) {
	v := openStandalone(t)
	if err := v.committer.Acquire(context.Background()); err != nil { // so that it has to wait
		t.Fatal(err)
	}
	tx := v.Begin()
	if err := tx.Write(0, []byte("x")); err != nil {
		t.Fatal(err)
	}
	var none context.Context
	_, err := func() (_ LSN, err error) {
		defer func() {
			if p := recover(); p != nil {
				t.Errorf("panic: %v", p)
			}
		}()
		return tx.Commit(none)
	}()
	v.committer.Release()
	if err == nil || errors.Is(err, ErrOutcomeUnknown) {
		t.Errorf("a nil context: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tx = v.Begin()
	if err := tx.Write(0, []byte("y")); err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Commit(ctx); err != nil {
		t.Errorf("the next commit: %v", err)
	}
}
