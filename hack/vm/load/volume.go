package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// A volume has stripes, each with its own sequence of transactions, which
// follows from seed, key and number alone. A transaction begins with its
// number at the stripe's start.
const (
	stripes    = 3
	stripeSize = 384 << 10
	volumeSize = stripes * stripeSize
)

// createRegion creates one that takes no weaker class than cacheline.
func createRegion(path string) error {
	return nvmmirror.Create(path, nvmmirror.CreateOptions{Size: volumeSize, JournalSize: nvmmirror.MinJournal, Accept: pmem.Cacheline})
}

type volume struct {
	*nvmmirror.Volume
	run    *run
	name   string
	path   string
	counts [stripes]uint64 // transactions that are there
}

func (v *volume) key(stripe int) string { return fmt.Sprintf("%s.%d", v.name, stripe) }

// open checks the region as the check command does, and recovers it.
func (v *volume) open(peer *nvmmirror.Peer) error {
	report, err := nvmmirror.Check(v.path)
	if err != nil {
		return err
	}
	if report.Damaged {
		return fmt.Errorf("%s: check: %+v", v.path, report.Findings)
	}
	v.Volume, err = nvmmirror.Open(v.path, nvmmirror.Options{Peer: peer})
	if err != nil {
		return err
	}
	if s := v.Status(); s.Class != "cacheline" && s.Class != "byte" || s.Recovery.Damage != "" {
		return fmt.Errorf("%s: class %s, recovery %+v", v.path, s.Class, s.Recovery)
	}
	return nil
}

type write struct {
	off  int64
	data []byte
}

// transaction is number n of a stripe, its first being 1.
func (v *volume) transaction(stripe int, n uint64) []write {
	h := uint64(1469598103934665603) // FNV-1a of the key
	for _, c := range []byte(v.key(stripe)) {
		h = (h ^ uint64(c)) * 1099511628211
	}
	rng := rand.New(rand.NewPCG(v.run.seed^h, n))
	base := int64(stripe) * stripeSize
	tx := []write{{base, binary.LittleEndian.AppendUint64(nil, n)}}
	for range 1 + rng.IntN(4) {
		p := make([]byte, 1+rng.IntN(200))
		if rng.IntN(3) == 0 {
			p = make([]byte, 1+rng.IntN(9000))
		}
		for i := range p {
			p[i] = byte(n) + byte(i*7)
		}
		tx = append(tx, write{base + 8 + rng.Int64N(stripeSize-8-int64(len(p))), p})
	}
	return tx
}

// verify reads the whole volume, and wants of each stripe exactly the effect
// of its first transactions, and no fewer than were acknowledged.
func (v *volume) verify() error {
	data := make([]byte, volumeSize)
	if err := readWhole(v.Volume, data); err != nil {
		return err
	}
	model := make([]byte, volumeSize)
	for s := range stripes {
		at := s * stripeSize
		found := binary.LittleEndian.Uint64(data[at:])
		if acked := v.run.acked[v.key(s)]; found < acked {
			return fmt.Errorf("stripe %d holds %d transactions, %d were acknowledged: LOST", s, found, acked)
		}
		for n := range found {
			for _, w := range v.transaction(s, n+1) {
				copy(model[w.off:], w.data)
			}
		}
		if got, want := data[at:at+stripeSize], model[at:at+stripeSize]; !bytes.Equal(got, want) {
			return fmt.Errorf("stripe %d says that it holds %d transactions, and does not: it differs", s, found)
		}
		v.counts[s] = found
		v.run.say("found %s %d", v.key(s), found)
	}
	return nil
}

// readWhole waits for the peer, where reads need it.
func readWhole(v *nvmmirror.Volume, p []byte) error {
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		_, err := v.ReadAt(p, 0)
		if !errors.Is(err, nvmmirror.ErrNoLease) || time.Now().After(end) {
			return err
		}
	}
}

// write commits until it is killed.
func (v *volume) write(stripe int) error {
	for n := v.counts[stripe] + 1; ; n++ {
		tx := v.Begin()
		for _, w := range v.transaction(stripe, n) {
			if err := tx.Write(w.off, w.data); err != nil {
				tx.Discard()
				return err
			}
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		_, err := tx.Commit(ctx)
		cancel()
		if err != nil {
			return fmt.Errorf("%s: commit: %w", v.name, err)
		}
		v.run.say("ack %s %d", v.key(stripe), n)
	}
}
