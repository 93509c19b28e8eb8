package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror"
)

// creator creates regions in a directory, one after the other, and keeps the
// last few. What is published must be there after a crash of the kernel, in
// full length.
//
// Of each three regions one is left as it was published; one is opened and
// takes a transaction that holds its number; one does so after its storage was
// taken from it, as a sparse copy has none: then only MAP_SYNC makes the
// file system's metadata durable before what is stored.
type creator struct {
	run  *run
	name string // and the key of what is published; transactions are name.tx
	dir  string
	next uint64
}

const keep = 6

func (c *creator) path(n uint64) string { return fmt.Sprintf("%s/%d.nvm", c.dir, n) }

func (c *creator) verify() error {
	acked, wrote := c.run.acked[c.name], c.run.acked[c.name+".tx"]
	found := acked
	// The one after the last may have taken the oldest one's place.
	for n := max(acked+2, keep+1) - keep; n <= acked+keep; n++ {
		_, err := os.Stat(c.path(n))
		switch {
		case errors.Is(err, os.ErrNotExist) && n <= acked:
			return fmt.Errorf("%s was published: LOST", c.path(n))
		case errors.Is(err, os.ErrNotExist):
			continue
		case err != nil:
			return err
		}
		report, err := nvmmirror.Check(c.path(n))
		if err != nil {
			return fmt.Errorf("check: %w", err)
		}
		if report.Damaged {
			return fmt.Errorf("%s: check: %+v", c.path(n), report.Findings)
		}
		if err := c.verifyTransaction(n, n <= wrote); err != nil {
			return err
		}
		found = max(found, n)
	}
	c.run.say("found %s %d", c.name, found)
	c.next = found + 1
	return nil
}

// verifyTransaction verifies that of region n. Where it had not come to that, it
// does now: all up to the last that is acknowledged are then there.
func (c *creator) verifyTransaction(n uint64, acked bool) error {
	v, err := nvmmirror.Open(c.path(n), nvmmirror.Options{})
	if err != nil {
		return err
	}
	p := make([]byte, 8)
	_, err = v.ReadAt(p, volumeSize-8)
	got := binary.LittleEndian.Uint64(p)
	switch {
	case err != nil || got == n && n%3 != 0 || got == 0 && n%3 == 0:
	case got == 0 && acked:
		err = fmt.Errorf("the transaction in %s was acknowledged: LOST", c.path(n))
	case got == 0:
		_, err = v.WriteAt(binary.LittleEndian.AppendUint64(nil, n), volumeSize-8)
	default:
		err = fmt.Errorf("%s holds %d", c.path(n), got)
	}
	return errors.Join(err, v.Close())
}

func (c *creator) work() error {
	for ; ; c.next++ {
		// What was published last is at risk until something syncs the file
		// system again, which the next creation does.
		time.Sleep(rand.N(150 * time.Millisecond))
		if c.next > keep {
			if err := os.Remove(c.path(c.next - keep)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		if err := createRegion(c.path(c.next)); err != nil {
			return err
		}
		c.run.say("ack %s %d", c.name, c.next)
		if c.next%3 == 0 {
			continue
		}
		if c.next%3 == 1 {
			if err := punch(c.path(c.next)); err != nil {
				return err
			}
		}
		v, err := nvmmirror.Open(c.path(c.next), nvmmirror.Options{})
		if err != nil {
			return err
		}
		if _, err := v.WriteAt(binary.LittleEndian.AppendUint64(nil, c.next), volumeSize-8); err != nil {
			return err
		}
		c.run.say("ack %s.tx %d", c.name, c.next)
		time.Sleep(rand.N(100 * time.Millisecond))
		if err := v.Close(); err != nil {
			return err
		}
	}
}

// punch takes the storage of a new region's journal and data, which are zeros.
func punch(path string) error {
	ins, err := nvmmirror.Inspect(path)
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, a := range []nvmmirror.Area{ins.Journal, ins.Data} {
		if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, a.Offset, a.Length); err != nil {
			return fmt.Errorf("%s: punch a hole: %w", path, err)
		}
	}
	return f.Sync()
}
