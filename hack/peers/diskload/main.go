// Command diskload writes blocks of 4 KiB to random places of a block device,
// past the page cache and synced (O_DIRECT, O_DSYNC), some of them outstanding
// at any time, or compares two devices.
//
//	diskload write DEVICE BYTES DEPTH SECONDS
//	diskload compare DEVICE DEVICE BYTES
//
// Only the first BYTES of a device are used. The figures are printed as JSON.
package main

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const block = 4096

func main() {
	result, err := do(os.Args[1:])
	if err == nil {
		err = json.NewEncoder(os.Stdout).Encode(result)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "diskload:", err)
		os.Exit(1)
	}
}

func do(args []string) (any, error) {
	if len(args) == 0 {
		return nil, errors.New("write or compare?")
	}
	switch {
	case args[0] == "write" && len(args) == 5:
		var n [3]int
		for i := range n {
			var err error
			if n[i], err = strconv.Atoi(args[2+i]); err != nil || n[i] < 1 {
				return nil, fmt.Errorf("%q is not a positive number", args[2+i])
			}
		}
		return write(args[1], int64(n[0]), n[1], time.Duration(n[2])*time.Second)
	case args[0] == "compare" && len(args) == 4:
		n, err := strconv.ParseInt(args[3], 10, 64)
		if err != nil {
			return nil, err
		}
		return compare(args[1], args[2], n)
	}
	return nil, fmt.Errorf("what is %q?", args)
}

// Written is what write measured.
type Written struct {
	Writes int     `json:"writes"` // all of them
	Rate   float64 `json:"rate"`   // a second
	P50    float64 `json:"p50_us"`
}

// write keeps depth writes outstanding; one writes and waits by itself.
func write(device string, size int64, depth int, d time.Duration) (*Written, error) {
	fd, err := unix.Open(device, unix.O_WRONLY|unix.O_DIRECT|unix.O_DSYNC, 0)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", device, err)
	}
	defer unix.Close(fd)
	// A mapping starts at a page, as O_DIRECT wants.
	data, err := unix.Mmap(-1, 0, depth*block, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_POPULATE)
	if err != nil {
		return nil, err
	}
	defer unix.Munmap(data)
	// What one run writes is not what the last one wrote.
	seed := uint64(time.Now().UnixNano())
	rng := rand.New(rand.NewPCG(seed, 0))
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	w := &writer{fd: fd, blocks: size / block, data: data, rng: rng, start: time.Now(), end: d}
	w.latencies = make([]time.Duration, 0, 1<<18)
	if depth == 1 {
		err = w.alone()
	} else {
		err = w.several(depth)
	}
	if err != nil {
		return nil, fmt.Errorf("%s: %w", device, err)
	}
	took := time.Since(w.start)
	slices.Sort(w.latencies)
	p50 := w.latencies[len(w.latencies)/2]
	return &Written{len(w.latencies), float64(len(w.latencies)) / took.Seconds(), float64(p50.Nanoseconds()) / 1e3}, nil
}

type writer struct {
	fd        int
	blocks    int64
	data      []byte
	rng       *rand.Rand
	start     time.Time
	end       time.Duration
	latencies []time.Duration
}

// next changes a block of memory, and says where it goes.
func (w *writer) next(b []byte) int64 {
	binary.LittleEndian.PutUint64(b, w.rng.Uint64())
	return w.rng.Int64N(w.blocks) * block
}

func (w *writer) alone() error {
	for {
		begin := time.Since(w.start)
		if begin > w.end && len(w.latencies) > 0 {
			return nil
		}
		off := w.next(w.data)
		if n, err := unix.Pwrite(w.fd, w.data, off); err != nil || n != block {
			return fmt.Errorf("write at %d: %d bytes, %v", off, n, err)
		}
		w.latencies = append(w.latencies, time.Since(w.start)-begin)
	}
}

// compared is what compare found.
type compared struct {
	Blocks  int64 `json:"blocks"`
	Written int64 `json:"written"` // not zero
}

func compare(a, b string, size int64) (*compared, error) {
	const chunk = 1 << 20
	var f [2]*os.File
	var err error
	var mem [2][]byte
	for i, path := range []string{a, b} {
		if f[i], err = os.OpenFile(path, os.O_RDONLY|unix.O_DIRECT, 0); err != nil {
			return nil, err
		}
		defer f[i].Close()
		if mem[i], err = unix.Mmap(-1, 0, chunk, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON); err != nil {
			return nil, err
		}
	}
	c := &compared{}
	zero := make([]byte, block)
	for off := int64(0); off < size; off += chunk {
		n := min(chunk, size-off)
		for i := range f {
			if _, err := f[i].ReadAt(mem[i][:n], off); err != nil {
				return nil, err
			}
		}
		for at := int64(0); at < n; at += block {
			x, y := mem[0][at:at+block], mem[1][at:at+block]
			if !bytes.Equal(x, y) {
				return nil, fmt.Errorf("%s and %s differ in the block at %d", a, b, off+at)
			}
			c.Blocks++
			if !bytes.Equal(x, zero) {
				c.Written++
			}
		}
	}
	return c, nil
}
