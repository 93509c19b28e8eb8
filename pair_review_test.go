package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest"

	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// TestLeaseOutlastsTheConfiguration: a node that is opened without its peer and
// promoted waits for the lease of the primary that it had: that one may be cut
// off, and read on.
func TestLeaseOutlastsTheConfiguration(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{quiet: true})
	commit(t, a, 0, []byte{1})
	quiesce(t, a, b)
	b.close()
	_, lease := replicate.Timing(b.opt.Peer.Timeout)
	b.opt.Peer, b.wire = nil, nil
	opened := time.Now()
	b.open()
	b.promote(false)
	if d := time.Since(opened); d < lease+lease/10 { // clocks may differ by a tenth
		t.Errorf("promoted %v after it was opened, the lease is %v", d, lease)
	}
	commit(t, b, 0, []byte{2})
	p := make([]byte, 1)
	if _, err := a.ReadAt(p, 0); err == nil {
		t.Errorf("read %d after 2 was acknowledged by the new primary", p[0])
	} else if !errors.Is(err, ErrNoLease) {
		t.Error(err)
	}
}

// TestDroppedLogIsNotAcknowledged: a checkpoint that comes while a former
// primary drops what nobody acknowledged does not note it as acknowledged.
func TestDroppedLogIsNotAcknowledged(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{quiet: true})
	a.close()
	var checkpointed atomic.Int32
	a.opt.Logger = zaptest.NewLogger(t, zaptest.WrapOptions(zap.Hooks(func(e zapcore.Entry) error {
		if strings.HasPrefix(e.Message, "dropping log") {
			checkpointed.Add(1)
			if err := a.checkpoint(false); err != nil {
				t.Error(err)
			}
		}
		return nil
	})))
	a.open()
	a.inSync()
	b.inSync()
	commit(t, a, 0, []byte{1})
	b.wire.link.set(true)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	tx := a.Begin()
	if err := tx.Write(100, bytes.Repeat([]byte{7}, 300<<10)); err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Commit(ctx); !errors.Is(err, ErrOutcomeUnknown) {
		t.Fatal(err)
	}
	b.peerIs("lost")
	b.promote(false)
	commit(t, b, 0, []byte{2})
	b.wire.link.set(false)
	a.inSync()
	b.inSync()
	if checkpointed.Load() != 1 {
		t.Fatalf("log was dropped %d times", checkpointed.Load())
	}
	a.metaMu.Lock()
	acked := a.meta.State.Acked
	a.metaMu.Unlock()
	if end := a.journal.End(); acked > end {
		t.Errorf("acknowledged are %d, the log ends at %d", acked, end)
	}
	identical(t, b, a)
}

// TestInvalidMetadataIsNotWritten: what the next start would refuse is not
// written in the first place.
func TestInvalidMetadataIsNotWritten(t *testing.T) {
	mem := newImage(t, smallSize, smallJournal)
	v := openQuiet(t, mem)
	before := bytes.Clone(mem.b[:2*metaArea])
	err := v.updateMeta(func(m *metadata) error {
		m.State.History = journal.History{{Epoch: journal.Epoch{Counter: 9}, Start: 64}, {Start: 128}}
		return nil
	})
	if err == nil || v.failed.Load() != nil || !bytes.Equal(mem.b[:2*metaArea], before) {
		t.Errorf("%v", err)
	}
}

// Nodes that are configured differently say so, both of them.
func TestConfiguredDifferently(t *testing.T) {
	t.Parallel()
	a, b := pairInSync(t, testConfig{})
	b.close()
	b.opt.Ack, b.opt.OnPeerLoss = AckAsync, Alone
	peer := *b.opt.Peer
	peer.Timeout *= 2
	b.opt.Peer = &peer
	b.open()
	for n, want := range map[*testNode]string{
		a: "ack is both here and async there, on_peer_loss is block here and alone there, timeout is " + a.opt.Peer.Timeout.String() + " here",
		b: "ack is async here and both there, on_peer_loss is alone here and block there, timeout is " + peer.Timeout.String() + " here",
	} {
		n.until("told so", func(s Status) bool {
			return slices.ContainsFunc(s.Degraded, func(d string) bool {
				return strings.HasPrefix(d, "the nodes are configured differently") && strings.Contains(d, want)
			})
		})
	}
	b.close()
	b.opt = a.opt
	peer.Timeout /= 2
	b.opt.Peer = &peer
	b.open()
	a.until("alike", func(s Status) bool { return s.Peer == "in-sync" && len(s.Degraded) == 1 })
}
