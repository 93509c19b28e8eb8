package faultwire

import (
	"fmt"
	"net"
	"testing"
	"time"
)

const benchWrite = 256 << 10

// BenchmarkWire measures a stream through the wire, both ends and the relay in
// this process, with one packet of a hundred swapped: what a test of damage
// gets. Allocations are those of the whole process.
func BenchmarkWire(b *testing.B) {
	for _, mtu := range []int{1500, 4096, 9000, 65000} {
		for _, signed := range []bool{false, true} {
			b.Run(fmt.Sprintf("mtu=%d/signed=%v", mtu, signed), func(b *testing.B) {
				w := needWire(b, Config{MTU: mtu, Seed: 1})
				from, to := needPair(b, w, false, signed)
				w.AtoB.SetPlan(Plan{Swap: Rule{Every: 100}})
				stream(b, from, to)
				s := w.AtoB.Stats()
				b.ReportMetric(float64(s.Packets)/b.Elapsed().Seconds(), "packets/s")
				b.ReportMetric(float64(s.Swapped), "swapped")
				b.ReportMetric(float64(counters(b, w.A)[QueueDrops]), "queue-drops")
			})
		}
	}
}

// BenchmarkRoundTrip measures what the relay adds to one message each way.
func BenchmarkRoundTrip(b *testing.B) {
	w := needWire(b, Config{Seed: 1})
	from, to := needPair(b, w, false, true)
	go func() {
		buf := make([]byte, 64)
		for {
			if _, err := to.Read(buf); err != nil {
				return // the connection is closed
			}
			if _, err := to.Write(buf); err != nil {
				return
			}
		}
	}()
	buf := make([]byte, 64)
	for b.Loop() {
		if _, err := from.Write(buf); err != nil {
			b.Fatal(err)
		}
		if _, err := from.Read(buf); err != nil {
			b.Fatal(err)
		}
	}
}

func stream(b *testing.B, from, to *net.TCPConn) {
	b.SetBytes(benchWrite)
	b.ReportAllocs()
	if err := to.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		b.Fatal(err)
	}
	received := make(chan error, 1)
	go func() {
		buf := make([]byte, benchWrite)
		for {
			if _, err := to.Read(buf); err != nil {
				received <- err
				return
			}
		}
	}()
	buf := make([]byte, benchWrite)
	fillBlock(buf, 1, 0)
	for b.Loop() {
		if _, err := from.Write(buf); err != nil {
			b.Fatal(err)
		}
	}
	if err := from.CloseWrite(); err != nil {
		b.Fatal(err)
	}
	<-received // the end of the stream: everything sent has arrived
}
