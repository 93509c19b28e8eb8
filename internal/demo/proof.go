package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate"
)

const (
	blockSize  = replicate.BlockSize
	tableEntry = 16 // bytes of the block table for a block
)

// prove reads the survivor's volume and looks for each transaction.
func (d *demo) prove(ctx context.Context) (string, error) {
	if err := d.spoil(ctx); err != nil {
		return "", fmt.Errorf("sabotage: %w", err)
	}
	image, bad, err := d.readVolume(ctx)
	if err != nil {
		return "", err
	}
	t := d.load.compare(image, bad)
	d.found = t
	if err := t.verdict(); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d of %d acknowledged transactions read back from b, equal; of unknown outcome %d whole, %d absent", t.equal, t.acked, t.whole, t.absent), nil
}

// verdict is nil where everything is as it must be.
func (t *tally) verdict() error {
	if t.equal == t.acked && t.partial+t.stray+t.unreadable == 0 && t.acked > 0 {
		return nil
	}
	return errors.New(t.String())
}

func (t *tally) String() string {
	s := fmt.Sprintf("%d transactions acknowledged, %d lost, %d wrong", t.acked, t.lost, t.wrong)
	for _, more := range []struct {
		n    int
		what string
	}{
		{t.unreadable, "in damaged blocks, which are not served"},
		{t.partial, "of unknown outcome there in part"},
		{t.stray, "there that must not be"},
	} {
		if more.n > 0 {
			s += fmt.Sprintf(", %d %s", more.n, more.what)
		}
	}
	return s
}

// readVolume reads all of b's volume, and says which blocks it does not serve.
func (d *demo) readVolume(ctx context.Context) (image []byte, bad map[int64]bool, err error) {
	const piece = 1 << 20
	image, bad = make([]byte, volumeSize), map[int64]bool{}
	for off := int64(0); off < volumeSize; off += piece {
		if d.b.admin.Read(ctx, off, image[off:off+piece]) == nil {
			continue
		}
		for at := off; at < off+piece; at += blockSize {
			if err := d.b.admin.Read(ctx, at, image[at:at+blockSize]); err != nil {
				if bad[at/blockSize] = true; len(bad) > 8 || ctx.Err() != nil {
					return nil, nil, err
				}
			}
		}
	}
	return image, bad, nil
}

// spoil changes a byte of an acknowledged transaction, if it is asked to.
func (d *demo) spoil(ctx context.Context) error {
	id := 0
	for d.load.record[id].outcome != acknowledged {
		id++
	}
	off, _ := slotOf(id)
	wrong := []byte{^d.load.content(id, make([]byte, largeSlot))[0]}
	switch d.o.Sabotage {
	case "":
		return nil
	case SabotageWrite:
		_, err := d.b.admin.Write(ctx, off, wrong, writeTime)
		return err
	case SabotageMemory:
		i, err := nvmmirror.Inspect(d.b.region)
		if err != nil {
			return err
		}
		f, err := os.OpenFile(d.b.region, os.O_WRONLY, 0)
		if err != nil {
			return err
		}
		_, err = f.WriteAt(wrong, i.Data.Offset+off)
		return errors.Join(err, f.Close())
	}
	return fmt.Errorf("%q is neither %s nor %s", d.o.Sabotage, SabotageMemory, SabotageWrite)
}

// region is a region's file, mapped for reading.
type region struct {
	*pmem.View
	info *nvmmirror.Inspection
}

func openRegion(path string) (*region, error) {
	info, err := nvmmirror.Inspect(path)
	if err != nil {
		return nil, err
	}
	v, err := pmem.OpenReadOnly(path)
	if err != nil {
		return nil, err
	}
	return &region{v, info}, nil
}

func (r *region) area(a nvmmirror.Area, n int64) []byte { return r.Bytes()[a.Offset : a.Offset+n] }

// identical stops both nodes and compares their regions.
func (d *demo) identical(ctx context.Context) (string, error) {
	if err := errors.Join(d.a.stop(ctx), d.b.stop(ctx)); err != nil {
		return "", err
	}
	var r [2]*region
	for i, n := range []*daemon{d.a, d.b} {
		report, err := nvmmirror.Check(n.region)
		if err != nil {
			return "", err
		}
		if report.Damaged || !report.Clean || len(report.Findings) > 0 {
			return "", fmt.Errorf("%s is stopped, and its region is not as a clean stop leaves it: closed cleanly %v, findings %+v", n.name, report.Clean, report.Findings)
		}
		if r[i], err = openRegion(n.region); err != nil {
			return "", err
		}
		defer r[i].Close()
	}
	table, data, err := differences(r[0], r[1])
	if err != nil {
		return "", err
	}
	if table+data > 0 {
		return "", fmt.Errorf("the regions differ in %d blocks of data and %d entries of the block table", data, table)
	}
	for i, n := range []*daemon{d.a, d.b} {
		t := d.load.compare(r[i].area(r[i].info.Data, volumeSize), nil)
		if err := t.verdict(); err != nil {
			return "", fmt.Errorf("in the region of %s: %w", n.name, err)
		}
		d.found = t
	}
	return fmt.Sprintf("%s of data, %d block table entries: no byte differs; all %d acknowledged are in both",
		bytesOf(volumeSize), int64(volumeSize/blockSize), d.found.equal), nil
}

// differences counts the blocks, and their entries, in which two regions
// differ.
func differences(a, b *region) (table, data int, err error) {
	defer pmem.Recover(a, pmem.Arm(), &err)
	count := func(x, y []byte, size int64) (n int) {
		for at := int64(0); at < int64(len(x)); at += size {
			if !bytes.Equal(x[at:at+size], y[at:at+size]) {
				n++
			}
		}
		return n
	}
	const entries = volumeSize / blockSize * tableEntry
	table = count(a.area(a.info.Table, entries), b.area(b.info.Table, entries), tableEntry)
	data = count(a.area(a.info.Data, volumeSize), b.area(b.info.Data, volumeSize), blockSize)
	return table, data, nil
}
