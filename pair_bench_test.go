package nvmmirror

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

const benchEnv = "NVMMIRROR_TEST_BENCH_PEER"

// TestBenchPeer is the secondary's process of BenchmarkMirroredCommit.
func TestBenchPeer(t *testing.T) {
	args := strings.Split(os.Getenv(benchEnv), "|")
	if len(args) != 3 {
		t.Skip("only as a child of BenchmarkMirroredCommit")
	}
	v, err := Open(args[0], Options{Peer: &Peer{Listen: args[1], Address: args[2], Key: []byte("a key of both")}})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	bufio.NewReader(os.Stdin).ReadString('\n') // until the parent goes
}

// pairOfProcesses is a primary here, and its secondary in another process,
// over TCP_MD5SIG on loopback.
func pairOfProcesses(b *testing.B, size, journal int64) *testNode {
	b.Helper()
	p, s := newPair(b, testConfig{bare: true, quiet: true, size: size, journal: journal, timeout: time.Second})
	s.close()
	cmd := exec.Command(os.Args[0], "-test.run=^TestBenchPeer$")
	cmd.Env = append(os.Environ(), benchEnv+"="+s.path+"|"+s.opt.Peer.Listen+"|"+s.opt.Peer.Address)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { stdin.Close(); cmd.Wait() })
	p.promote(false)
	p.inSync()
	return p
}

// BenchmarkMirroredCommit commits transactions of one write, acknowledged by
// both processes, by size and number of committers.
func BenchmarkMirroredCommit(b *testing.B) {
	const volume = 64 << 20
	p := pairOfProcesses(b, volume, 64<<20)
	for _, size := range []int{64, 4 << 10, 64 << 10, 1 << 20} {
		for _, committers := range []int{1, 4, 16, 64, 256} {
			b.Run(fmt.Sprintf("size=%d/committers=%d", size, committers), func(b *testing.B) {
				b.ReportAllocs()
				b.SetBytes(int64(size))
				work := make(chan struct{}, b.N)
				for range b.N {
					work <- struct{}{}
				}
				close(work)
				var wg sync.WaitGroup
				data := make([]byte, size)
				b.ResetTimer()
				for g := range committers {
					wg.Go(func() {
						ctx := context.Background()
						for i := 0; ; i++ {
							if _, ok := <-work; !ok {
								return
							}
							tx := p.Begin()
							tx.Write(int64((g*31+i)*size)%(volume-int64(size)), data)
							if _, err := tx.Commit(ctx); err != nil {
								b.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
			})
		}
	}
}
