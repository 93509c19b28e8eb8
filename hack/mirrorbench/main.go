// Mirrorbench measures commits of a real pair in two processes over loopback
// TCP_MD5SIG: latency with one committer, rate with several, and the stream of
// large transactions.
//
//	go run ./hack/mirrorbench -size 64 -committers 1 -duration 3s
//
// It prints one JSON object. hack/floor measures what the wire alone takes.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"slices"
	"sync"
	"time"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/pmem"
)

var (
	size       = flag.Int("size", 64, "bytes of a transaction")
	committers = flag.Int("committers", 1, "goroutines that commit")
	duration   = flag.Duration("duration", 3*time.Second, "how long to measure")
	poll       = flag.Duration("poll", 50*time.Microsecond, "busy poll before sleeping, negative: none")
	dir        = flag.String("dir", "/dev/shm", "where the regions go")
	profile    = flag.String("profile", "", "write CPU profiles of both nodes to FILE.primary and FILE.secondary")
	child      = flag.String("secondary", "", "internal: region, own and peer address")
)

func main() {
	flag.Parse()
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "mirrorbench:", err)
		os.Exit(1)
	}
}

func run() error {
	if *child != "" {
		return secondary()
	}
	tmp, err := os.MkdirTemp(*dir, "mirrorbench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	var addr [2]string
	for i := range addr {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		addr[i] = l.Addr().String()
		l.Close()
	}
	a, b := filepath.Join(tmp, "a"), filepath.Join(tmp, "b")
	for _, p := range []string{a, b} {
		if err := nvmmirror.Create(p, nvmmirror.CreateOptions{Size: 256 << 20, JournalSize: 64 << 20, Accept: pmem.Emulated}); err != nil {
			return err
		}
	}
	cmd := exec.Command("/proc/self/exe", append(os.Args[1:], "-secondary", b+" "+addr[1]+" "+addr[0])...)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	defer cmd.Wait()
	defer in.Close()

	v, err := open(a, addr[0], addr[1])
	if err != nil {
		return err
	}
	defer v.Close()
	if err := v.Promote(context.Background(), false); err != nil {
		return err
	}
	for v.Status().Peer != "in-sync" {
		time.Sleep(time.Millisecond)
	}
	stop, err := startProfile("primary")
	if err != nil {
		return err
	}
	defer stop()
	return measure(v)
}

func measure(v *nvmmirror.Volume) error {
	var wg sync.WaitGroup
	lat := make([][]time.Duration, *committers)
	errs := make([]error, *committers)
	var before, after runtime.MemStats
	commit := func(c, i int, p []byte) error {
		tx := v.Begin()
		slots := int(v.Size()) / (*size * *committers)
		if err := tx.Write(int64((i%slots)**committers+c)*int64(*size), p); err != nil {
			return err
		}
		_, err := tx.Commit(context.Background())
		return err
	}
	for i := range 2000 {
		if err := commit(0, i, make([]byte, *size)); err != nil {
			return err
		}
		if *size > 100000 && i > 50 {
			break
		}
	}
	for c := range lat {
		lat[c] = make([]time.Duration, 0, 1<<20)
	}
	runtime.ReadMemStats(&before)
	start := time.Now()
	for c := range *committers {
		wg.Go(func() {
			p := bytes.Repeat([]byte{byte(c + 1)}, *size)
			for i := 0; ; i++ {
				t := time.Now()
				if t.Sub(start) > *duration {
					return
				}
				if errs[c] = commit(c, i, p); errs[c] != nil {
					return
				}
				if len(lat[c]) < cap(lat[c]) {
					lat[c] = append(lat[c], time.Since(t))
				}
			}
		})
	}
	wg.Wait()
	took := time.Since(start)
	runtime.ReadMemStats(&after)
	var all []time.Duration
	for c := range lat {
		if errs[c] != nil {
			return errs[c]
		}
		all = append(all, lat[c]...)
	}
	slices.Sort(all)
	q := func(f float64) float64 { return float64(all[int(f*float64(len(all)-1))]) / 1e3 }
	n := float64(v.Status().Counters.Commits)
	return json.NewEncoder(os.Stdout).Encode(map[string]any{
		"size": *size, "committers": *committers, "p50_us": q(.5), "p99_us": q(.99), "p999_us": q(.999),
		"commits_per_s": float64(len(all)) / took.Seconds(), "mb_per_s": float64(len(all)**size) / 1e6 / took.Seconds(),
		"allocs_per_commit": float64(after.Mallocs-before.Mallocs) / n,
	})
}

func open(path, own, peer string) (*nvmmirror.Volume, error) {
	return nvmmirror.Open(path, nvmmirror.Options{Peer: &nvmmirror.Peer{
		Listen: own, Address: peer, Key: []byte("mirrorbench"), BusyPoll: *poll,
	}})
}

func secondary() error {
	var path, own, peer string
	if _, err := fmt.Sscan(*child, &path, &own, &peer); err != nil {
		return err
	}
	v, err := open(path, own, peer)
	if err != nil {
		return err
	}
	defer v.Close()
	stop, err := startProfile("secondary")
	if err != nil {
		return err
	}
	defer stop()
	io.Copy(io.Discard, os.Stdin)
	return nil
}

func startProfile(name string) (stop func(), err error) {
	if *profile == "" {
		return func() {}, nil
	}
	f, err := os.Create(*profile + "." + name)
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, err
	}
	return func() { pprof.StopCPUProfile(); f.Close() }, nil
}
