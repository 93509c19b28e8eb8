package nvmmirror

import (
	"context"
	"errors"
	"fmt"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// Tx is a transaction: writes that become durable and visible together, or
// not at all. It is for one goroutine.
type Tx struct {
	v   *Volume
	r   *journal.Request
	gen uint64
}

// Begin begins a transaction. Commit or Discard must follow.
func (v *Volume) Begin() Tx {
	r := journal.NewRequest()
	return Tx{v, r, r.Generation()}
}

func (tx Tx) live() bool { return tx.r != nil && tx.r.Generation() == tx.gen }

// Write adds a write of p at byte offset off. p is not copied: it must not
// change until Commit has returned, else persistence can fail for the whole volume,
// which cannot tell it from memory that lost bits. Where writes overlap, the last one
// counts.
// The error matches ErrOutOfRange, or ErrClosed once the transaction is over.
func (tx Tx) Write(off int64, p []byte) error {
	if !tx.live() {
		return fmt.Errorf("transaction: %w", ErrClosed)
	}
	if err := tx.v.inRange(off, len(p)); err != nil {
		return err
	}
	if len(p) > 0 {
		tx.r.Add(off, p)
	}
	return nil
}

// Commit makes the transaction durable on every required node and visible,
// and returns its LSN. ErrOutcomeUnknown: the wait ended early (ctx, the
// volume was closed, the peer took over), and the transaction may or may not
// survive. After any other error nothing of it ever becomes visible. The
// transaction is over in any case.
func (tx Tx) Commit(ctx context.Context) (LSN, error) {
	if !tx.live() {
		return 0, fmt.Errorf("transaction: %w", ErrClosed)
	}
	v := tx.v
	if ctx == nil { // it would be missed only where the commit has to wait, with the driver's role on its way
		tx.r.Free()
		return 0, errors.New("commit: nil context")
	}
	if tx.r.Empty() {
		tx.r.Free()
		return v.Applied(), nil
	}
	if err := v.ready(ctx); err != nil {
		tx.r.Free()
		return 0, err
	}
	n := uint64(tx.r.Size())
	lsn, err := v.committer.Commit(ctx, tx.r)
	if err == nil {
		v.counters.commits.Add(1)
		v.counters.bytes.Add(n)
	}
	return lsn, err
}

// Discard gives the transaction up.
func (tx Tx) Discard() {
	if tx.live() {
		tx.r.Free()
	}
}

// WriteAt is a transaction of one write. Its outcome is unknown where the
// error is ErrOutcomeUnknown.
func (v *Volume) WriteAt(p []byte, off int64) (int, error) {
	tx := v.Begin()
	if err := tx.Write(off, p); err != nil {
		tx.Discard()
		return 0, err
	}
	if _, err := tx.Commit(context.Background()); err != nil {
		return 0, err
	}
	return len(p), nil
}

// ready waits until a primary serves: after a restart it needs its peer, or a
// decision to go on alone.
func (v *Volume) ready(ctx context.Context) error {
	if v.pair.Serving() {
		return nil
	}
	if v.pair.Role() != replicate.Primary {
		return v.pair.NotPrimary() // who is, was not known when it stepped back
	}
	if err := v.whileOpen(func() error { return v.pair.AwaitServing(ctx) }); err != nil {
		return err
	}
	return errOf(v.failed.Load()) // then it never will
}

func (v *Volume) inRange(off int64, n int) error {
	if off < 0 || off > v.size || int64(n) > v.size-off {
		return fmt.Errorf("%w: %d bytes at offset %d of %d", ErrOutOfRange, n, off, v.size)
	}
	return nil
}

// Applied is the LSN up to which readers see the log.
func (v *Volume) Applied() LSN { return LSN(v.applied.Load()) }
