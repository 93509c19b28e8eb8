package faultwire

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
)

func needComparison(t *testing.T, cfg CompareConfig) Result {
	t.Helper()
	cfg.Logf = t.Logf
	res, err := CompareTransports(testContext(t), cfg)
	if errors.Is(err, ErrNotPermitted) {
		t.Skipf("skipped: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return res
}

func TestCompareTransports(t *testing.T) {
	for name, cfg := range map[string]CompareConfig{
		"default": {},
		"jumbo":   {MTU: 9000, Every: 10},
		"IPv6":    {IPv6: true, Bytes: 4 << 20},
	} {
		t.Run(name, func(t *testing.T) {
			res := needComparison(t, cfg)
			if err := res.Verdict(); err != nil {
				t.Error(err)
			}
			for name, x := range map[string]Transfer{"plain": res.Plain, "TCP_MD5SIG": res.Signed} {
				t.Logf("%-10s %d MiB in %v: %d of %d blocks wrong, %d packets corrupted, TCPMD5Failure +%d", name, x.Bytes>>20, x.Duration.Round(time.Millisecond), x.Wrong, x.Blocks, x.Corrupted, x.FailuresB)
				if want := max(cfg.Bytes, 0); want != 0 && x.Bytes != want || x.Blocks*BlockSize != x.Bytes || x.Duration <= 0 {
					t.Errorf("%s: %+v", name, x)
				}
			}
		})
	}
}

func TestCompareTransportsEndsWithItsContext(t *testing.T) {
	needComparison(t, CompareConfig{Bytes: BlockSize}) // skips where no wire can be made
	why := errors.New("enough")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	// Every packet of the signed transfer is corrupted: it never ends by itself.
	defer time.AfterFunc(200*time.Millisecond, func() { cancel(why) }).Stop()
	_, err := CompareTransports(ctx, CompareConfig{Every: 1})
	if !errors.Is(err, why) {
		t.Errorf("got %v", err)
	}
}

func TestCompareRefusesPartsOfBlocks(t *testing.T) {
	for _, n := range []int64{-BlockSize, 1, BlockSize + 1} {
		if _, err := CompareTransports(t.Context(), CompareConfig{Bytes: n}); err == nil || !strings.Contains(err.Error(), "blocks") {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

// The verdict must fail when the measurement shows anything else.
func TestVerdict(t *testing.T) {
	good := Result{
		Plain:  Transfer{Corrupted: 5, Wrong: 5},
		Signed: Transfer{Corrupted: 6, FailuresB: 6},
	}
	if err := good.Verdict(); err != nil {
		t.Error(err)
	}
	for name, spoil := range map[string]func(*Result){
		"nothing corrupted":     func(r *Result) { r.Signed.Corrupted, r.Signed.FailuresB = 0, 0 },
		"plain delivers right":  func(r *Result) { r.Plain.Wrong = 0 },
		"plain counts":          func(r *Result) { r.Plain.FailuresA = 1 },
		"signed delivers wrong": func(r *Result) { r.Signed.Wrong = 1 },
		"one goes uncounted":    func(r *Result) { r.Signed.FailuresB-- },
		"one too many":          func(r *Result) { r.Signed.FailuresB++ },
		"at the sender":         func(r *Result) { r.Signed.FailuresA = 1 },
	} {
		r := good
		spoil(&r)
		if r.Verdict() == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
