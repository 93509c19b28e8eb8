package faultwire

import (
	"fmt"
	"testing"
	"time"
)

// eachTransport runs a test over IPv4 and IPv6, plain and signed.
func eachTransport(t *testing.T, f func(t *testing.T, ipv6, signed bool)) {
	for _, ipv6 := range []bool{false, true} {
		for _, signed := range []bool{false, true} {
			t.Run(fmt.Sprintf("ipv6=%v,signed=%v", ipv6, signed), func(t *testing.T) { f(t, ipv6, signed) })
		}
	}
}

// landed is where the receiving kernel found damage.
type landed struct{ checksum, md5, truncated uint64 }

// Every fault over real connections: what arrives, and which counter of the
// receiving kernel has seen each damaged packet.
func TestFaultsLandWhereTheyShould(t *testing.T) {
	const (
		every = 40
		bytes = 4 << 20
	)
	rule := Rule{Every: every}
	for _, c := range []struct {
		name  string
		fault Fault
		plan  Plan
		// passes: plain TCP delivers the damage.
		passes bool
		// want is where n damaged packets are to be found.
		want func(signed bool, got landed, n uint64) bool
	}{
		{name: "swap", fault: Swap, plan: Plan{Swap: rule}, passes: true, want: onlySignature},
		{name: "add", fault: Add, plan: Plan{Add: rule}, passes: true, want: onlySignature},
		{name: "flip", fault: Flip, plan: Plan{Flip: rule}, want: sumOrSignature},
		{name: "flip anywhere", fault: Flip, plan: Plan{Flip: Rule{Every: every, Any: true}}},
		{name: "truncate", fault: Truncate, plan: Plan{Truncate: rule}, want: func(_ bool, got landed, n uint64) bool {
			return got == landed{truncated: n}
		}},
		{name: "truncate with the right length", fault: Truncate, plan: Plan{Truncate: rule, FixLength: true}, want: sumOrSignature},
		{name: "drop", fault: Drop, plan: Plan{Drop: rule}, want: nothing},
		{name: "duplicate", fault: Duplicate, plan: Plan{Duplicate: rule}, want: nothing},
		{name: "reorder", fault: Reorder, plan: Plan{Reorder: rule, ReorderBy: 4}, want: nothing},
		{name: "delay", fault: Delay, plan: Plan{Delay: rule, DelayFor: time.Millisecond}, want: nothing},
	} {
		t.Run(c.name, func(t *testing.T) {
			eachTransport(t, func(t *testing.T, ipv6, signed bool) {
				w := needWire(t, Config{Seed: 42})
				from, to := needPair(t, w, ipv6, signed)
				before := counters(t, w.B)
				w.AtoB.SetPlan(c.plan)
				wrong := carry(t, from, to, w.Seed(), bytes)
				w.AtoB.SetPlan(Plan{})
				after := counters(t, w.B)
				s := w.AtoB.Stats()
				n := s.Of(c.fault)

				if strikes := s.Data / every; n+1 < strikes || n > s.Packets/every+1 {
					t.Errorf("struck %d of %d packets, want about %d", n, s.Packets, strikes)
				}
				if passes := c.passes && !signed; passes != (wrong > 0) {
					t.Errorf("%d wrong blocks, damage is to pass: %v", wrong, passes)
				}
				if want := s.Packets - s.Dropped + s.Duplicated; s.Delivered != want {
					// A delayed or held packet may still be on its way; none is lost.
					if err := w.AtoB.Await(testContext(t), func(s Stats) bool { return s.Delivered >= want }); err != nil {
						t.Errorf("delivered %d of %d: %v", s.Delivered, want, err)
					}
				}
				got := landed{
					checksum:  after.Rise(before, CsumErrors),
					md5:       after.Rise(before, MD5Failure),
					truncated: after.Rise(before, InTruncated) + after.Rise(before, InTruncated6),
				}
				if c.want != nil && !c.want(signed, got, n) {
					t.Errorf("%d struck, signed %v, landed %+v", n, signed, got)
				}
			})
		})
	}
}

// onlySignature: the checksum sees nothing, a signature everything.
func onlySignature(signed bool, got landed, n uint64) bool {
	if signed {
		return got == landed{md5: n}
	}
	return got == landed{}
}

// sumOrSignature: all of it is found. On a signed connection Linux checks the
// signature before the checksum, but for segments of at most 76 bytes.
func sumOrSignature(signed bool, got landed, n uint64) bool {
	if signed {
		return got.checksum+got.md5 == n && got.md5 > 0
	}
	return got == landed{checksum: n}
}

func nothing(_ bool, got landed, _ uint64) bool { return got == landed{} }

// The ground that everything stands on: a packet leaves a namespace with its
// checksum computed, and is no larger than the MTU.
func TestKernelComputesChecksums(t *testing.T) {
	eachTransport(t, func(t *testing.T, ipv6, signed bool) {
		w := needWire(t, Config{MTU: 9000})
		w.AtoB.Capture(1000)
		w.BtoA.Capture(1000)
		from, to := needPair(t, w, ipv6, signed)
		carry(t, from, to, 1, 1<<20)
		for _, d := range []*Direction{w.AtoB, w.BtoA} {
			all := d.Captured()
			if len(all) == 0 {
				t.Errorf("%v: nothing captured", d)
			}
			for _, s := range all {
				if !checksumRight(s.Raw) || len(s.Raw) > 9000 {
					t.Errorf("%v: %d bytes from %v, checksum right: %v", d, len(s.Raw), s.Src, checksumRight(s.Raw))
				}
				if (s.Digest != nil) != signed {
					t.Errorf("%v: signed %v, want %v", d, s.Digest != nil, signed)
				}
			}
		}
	})
}

func TestDelayIsLatency(t *testing.T) {
	const delay = 15 * time.Millisecond
	w := needWire(t, Config{})
	from, to := needPair(t, w, false, true)
	w.SetPlan(Plan{Delay: Rule{Every: 1, Any: true}, DelayFor: delay})
	start := time.Now()
	exchange(t, from, to, "there")
	exchange(t, to, from, "and back")
	if took := time.Since(start); took < 2*delay {
		t.Errorf("there and back took %v over a wire of %v each way", took, delay)
	}
}

// One way is cut: the other goes on, and what was said meanwhile arrives when
// it is healed.
func TestCutOneWayAndHeal(t *testing.T) {
	eachTransport(t, func(t *testing.T, ipv6, signed bool) {
		w := needWire(t, Config{})
		from, to := needPair(t, w, ipv6, signed)
		exchange(t, from, to, "before")
		w.AtoB.SetCut(true)
		cut := w.AtoB.Stats().Cut
		exchange(t, to, from, "the other way")
		if _, err := from.Write([]byte("meanwhile")); err != nil {
			t.Fatal(err)
		}
		delivered := w.AtoB.Stats().Delivered
		// The acknowledgement, the message and its first retransmission.
		if err := w.AtoB.Await(testContext(t), func(s Stats) bool { return s.Cut >= cut+3 }); err != nil {
			t.Fatal(err)
		}
		if d := w.AtoB.Stats().Delivered; d != delivered {
			t.Errorf("%d packets came through the cut", d-delivered)
		}
		w.AtoB.SetCut(false)
		if err := expect(to, "meanwhile"); err != nil {
			t.Error(err)
		}
	})
}
