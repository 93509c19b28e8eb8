package report

import "testing"

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 0.0123456: "0.0123", 1.234: "1.23", 12.34: "12.3", 123.4: "123", 999.4: "999", 1234.4: "1,234", 1234567: "1,234,567", -2000: "-2,000"} {
		if got := number(v); got != want {
			t.Errorf("%v is %q, not %q", v, got, want)
		}
	}
	for n, want := range map[int]string{8: "8 B", 1023: "1023 B", 4096: "4 KiB", 5000: "5000 B", 1 << 20: "1 MiB"} {
		if got := bytesText(n); got != want {
			t.Errorf("%d is %q, not %q", n, got, want)
		}
	}
}

// An axis holds its data with room to spare, and no more than a step of it.
func TestOutward(t *testing.T) {
	for _, c := range [][4]float64{{8, 80, 5, 100}, {10, 100, 5, 200}, {0.11, 9, 0.1, 10}, {2.5, 2.5, 2, 5}} {
		low, high := outward(c[0], c[1])
		if low != c[2] || high != c[3] {
			t.Errorf("%v to %v is drawn from %v to %v, not %v to %v", c[0], c[1], low, high, c[2], c[3])
		}
	}
	labels := 0
	for _, tick := range (logTicks{}).Ticks(5, 200) {
		if tick.Value < 5 || tick.Value > 200.1 {
			t.Errorf("a tick at %v", tick.Value)
		}
		if tick.Label != "" {
			labels++
		}
	}
	if labels != 6 { // 5 10 20 50 100 200
		t.Errorf("%d labels", labels)
	}
}
