package transport

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

// Compare with hack/floor/run.sh, which does the same in C, in the same run.

func BenchmarkPingPong(b *testing.B) {
	for _, transport := range []string{"plain", NameMD5Sig, NameTLS} {
		for _, size := range []int{64, 4096} {
			for _, wait := range []string{"poll", "block"} {
				b.Run(fmt.Sprintf("%s/%dB/%s", transport, size, wait), func(b *testing.B) {
					pingPong(b, transport, order{size, wait == "poll"})
				})
			}
		}
	}
}

func pingPong(b *testing.B, transport string, o order) {
	c := startChild(b, transport)(o)
	out, in := [][]byte{make([]byte, o.bytes)}, make([]byte, 8)
	for range 1000 { // congestion window, caches, RTT estimate
		if err := transfer(c, out, in, o.poll); err != nil {
			b.Fatal(err)
		}
	}
	took := make([]time.Duration, 0, b.N+1<<20)
	b.ReportAllocs()
	for b.Loop() {
		start := time.Now()
		if err := transfer(c, out, in, o.poll); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(start))
	}
	slices.Sort(took)
	us := func(d time.Duration) float64 { return float64(d) / float64(time.Microsecond) }
	b.ReportMetric(us(took[len(took)/2]), "p50-µs")
	b.ReportMetric(us(took[len(took)*99/100]), "p99-µs")
}

func BenchmarkStream(b *testing.B) {
	for _, transport := range []string{"plain", NameMD5Sig, NameTLS} {
		for _, conns := range []int{1, 2} {
			b.Run(fmt.Sprintf("%s/%d", transport, conns), func(b *testing.B) { stream(b, transport, conns) })
		}
	}
}

// stream sends 256 MiB over each connection in writes of 64 KiB, the largest
// frame, and waits for the word that all of it was read.
func stream(b *testing.B, transport string, conns int) {
	const frame, frames = 64 << 10, 4096
	connect := startChild(b, transport)
	out := slices.Repeat([][]byte{make([]byte, frame)}, frames)
	cs := make([]Conn, conns)
	for i := range cs {
		cs[i] = connect(order{bytes: frame * frames})
	}
	b.SetBytes(int64(frame * frames * conns))
	for b.Loop() {
		errs := make(chan error, conns)
		for _, c := range cs {
			go func() { errs <- transfer(c, out, make([]byte, 8), false) }()
		}
		for range cs {
			if err := <-errs; err != nil {
				b.Fatal(err)
			}
		}
	}
}
