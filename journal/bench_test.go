package journal

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror/pmem"
)

var benchSizes = []int{64, 512, 4 << 10, 64 << 10, 1 << 20}

func benchLog(b *testing.B, size int64) *Log {
	b.Helper()
	mem, err := pmem.NewEmulated(size)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { mem.Close() })
	mem.Zero(0, size) // fresh memory of a virtual machine is slow once
	l := NewLog(mem, 0, size, 0)
	l.Reset(0, 0)
	l.SetEpoch(testEpoch)
	return l
}

// BenchmarkAppend makes one transaction of one write durable, on emulated
// memory.
func BenchmarkAppend(b *testing.B) {
	for _, n := range benchSizes {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			l := benchLog(b, 64<<20)
			r := requestOf([]Write{{0, make([]byte, n)}})
			reqs := []*Request{r}
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				if _, err := l.Append(reqs, r.Size(), 0); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// aloneSink acknowledges at once and applies nothing.
type aloneSink struct{ log *Log }

func (s aloneSink) Progress() (acked, limit LSN) {
	return s.log.End(), s.log.End() + LSN(s.log.Ring().Size())
}
func (s aloneSink) Apply(LSN) error    { return nil }
func (s aloneSink) Failed(error)       {}
func (s aloneSink) Wait(time.Duration) {}
func (s aloneSink) Wake()              {}

// BenchmarkCommitter is group commit without a peer and without data: one
// caller, and as many as there are CPUs.
func BenchmarkCommitter(b *testing.B) {
	commit := func(b *testing.B, c *Committer, p []byte) {
		r := NewRequest()
		r.Add(0, p)
		if _, err := c.Commit(context.Background(), r); err != nil {
			b.Fatal(err)
		}
	}
	for _, n := range benchSizes[:3] {
		b.Run(fmt.Sprintf("%d/one", n), func(b *testing.B) {
			l := benchLog(b, 64<<20)
			c := openCommitter(b, l, aloneSink{l}, 0)
			p := make([]byte, n)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			for b.Loop() {
				commit(b, c, p)
			}
		})
		b.Run(fmt.Sprintf("%d/parallel", n), func(b *testing.B) {
			l := benchLog(b, 64<<20)
			c := openCommitter(b, l, aloneSink{l}, 0)
			b.SetBytes(int64(n))
			b.ReportAllocs()
			b.SetParallelism(8)
			b.ResetTimer() // the log takes 0.1 s to make
			b.RunParallel(func(pb *testing.PB) {
				p := make([]byte, n)
				for pb.Next() {
					commit(b, c, p)
				}
			})
		})
	}
}

// BenchmarkScan verifies a full ring, as recovery does.
func BenchmarkScan(b *testing.B) {
	for _, n := range benchSizes {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			const size = 64 << 20
			l := benchLog(b, size)
			r := requestOf([]Write{{0, make([]byte, n)}})
			for l.End()+l.room(r.Size()) <= size {
				if _, err := l.Append([]*Request{r}, r.Size(), l.End()); err != nil {
					b.Fatal(err)
				}
			}
			b.SetBytes(int64(l.End()))
			b.ReportAllocs()
			for b.Loop() {
				scan, err := ScanFrom(l.Ring(), testHistory(0), testEpoch.Node, 0, 0, 0, nil)
				if err != nil || scan.End != l.End() {
					b.Fatal(scan, err)
				}
			}
		})
	}
}
