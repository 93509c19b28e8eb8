package nvmmirror

import "testing"

// A clean close notes where the log ends, for the next open, which then
// searches nothing; while the region is open the note is gone.
func TestCleanCloseNotesTheEnd(t *testing.T) {
	mem := newImage(t, 1<<20, MinJournal)
	v := openQuiet(t, mem)
	if _, err := (transaction{{0, []byte("x")}}).commit(v); err != nil {
		t.Fatal(err)
	}
	end := v.journal.End()
	if err := v.Close(); err != nil {
		t.Fatal(err)
	}
	c, err := readMetadata(mem.b)
	if err != nil {
		t.Fatal(err)
	}
	if m := c.meta; !m.Clean || !m.Settled || m.End != end {
		t.Fatalf("clean %v, settled %v, the log ends at %d, noted is %d", m.Clean, m.Settled, end, m.End)
	}
	scan, err := survey(mem.b, c.meta, nil)
	if err != nil || scan.End != end || scan.Damage != nil {
		t.Fatalf("%+v, %v", scan, err)
	}
	openQuiet(t, mem)
	if c, err = readMetadata(mem.b); err != nil || c.meta.Clean || c.meta.Settled || c.meta.End != 0 {
		t.Fatalf("of an open region: %+v, %v", c.meta, err)
	}
}
