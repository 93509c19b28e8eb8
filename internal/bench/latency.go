package bench

import (
	"math"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

const longest = 100 * time.Second // that a histogram can tell from longer ones

// newHistogram counts nanoseconds to three digits.
func newHistogram() *hdrhistogram.Histogram {
	return hdrhistogram.New(1, longest.Nanoseconds(), 3)
}

func record(h *hdrhistogram.Histogram, d time.Duration) {
	_ = h.RecordValue(min(max(d, 1), longest).Nanoseconds()) // in range: no error
}

// encode is a histogram as other programs read it.
func encode(h *hdrhistogram.Histogram) (string, error) {
	b, err := h.Encode(hdrhistogram.V2CompressedEncodingCookieBase)
	return string(b), err
}

// Latency sums a histogram up.
type Latency struct {
	Count int64   `json:"count"`
	P50   float64 `json:"p50_us"`
	P99   float64 `json:"p99_us"`
	P999  float64 `json:"p999_us"`
	Max   float64 `json:"max_us"`
}

// Tells reports whether so many were measured that a quantile, 0.99 say, says
// something: ten lie beyond it.
func (l Latency) Tells(q float64) bool { return math.Round(float64(l.Count)*(1-q)*1e6) >= 10*1e6 }

func latencyOf(h *hdrhistogram.Histogram) Latency {
	us := func(q float64) float64 { return float64(h.ValueAtQuantile(q)) / 1e3 }
	return Latency{h.TotalCount(), us(50), us(99), us(99.9), float64(h.Max()) / 1e3}
}
