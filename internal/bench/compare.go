package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// compare closes both nodes and compares what they must have in common: all
// data and the block table, byte for byte. It also looks for each committer's
// last transaction: two blank regions are equal too.
func (p *pair) compare(ctx context.Context) (err error) {
	if err := p.load.readBack(); err != nil {
		return fmt.Errorf("primary: %w", err)
	}
	if err := p.quiesce(ctx); err != nil {
		return err
	}
	err = p.primary.Close()
	p.primary = nil
	_, there := p.child.ask(request{Op: opNodeClose})
	if err := errors.Join(err, there); err != nil {
		return err
	}
	var info [2]*nvmmirror.Inspection
	var view [2]*pmem.View
	for i, path := range p.region {
		if info[i], err = nvmmirror.Inspect(path); err != nil {
			return err
		}
		if view[i], err = pmem.OpenReadOnly(path); err != nil {
			return err
		}
		defer view[i].Close()
	}
	defer pmem.Recover(view[0], pmem.Arm(), &err)
	for _, area := range []struct {
		what string
		of   func(*nvmmirror.Inspection) nvmmirror.Area
	}{
		{"block tables", func(i *nvmmirror.Inspection) nvmmirror.Area { return i.Table }},
		{"data", func(i *nvmmirror.Inspection) nvmmirror.Area { return i.Data }},
	} {
		a, b := area.of(info[0]), area.of(info[1])
		if err := same(view[0].Bytes()[a.Offset:][:a.Length], view[1].Bytes()[b.Offset:][:b.Length]); err != nil {
			return fmt.Errorf("the regions' %s differ: %w", area.what, err)
		}
	}
	return nil
}

func same(a, b []byte) error {
	if len(a) != len(b) {
		return fmt.Errorf("%d and %d bytes", len(a), len(b))
	}
	if bytes.Equal(a, b) {
		return nil
	}
	for i := range a {
		if a[i] != b[i] {
			return fmt.Errorf("first at byte %d of %d", i, len(a))
		}
	}
	return nil
}
