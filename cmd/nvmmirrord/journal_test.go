package main

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nvmmirror/nvmmirror"
)

// lines decodes what journal printed with -o json. The last line says where
// the log ends.
func lines(t *testing.T, out string) (segments []nvmmirror.SegmentInfo, stop nvmmirror.JournalStop) {
	t.Helper()
	all := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	for i, text := range all {
		var l nvmmirror.JournalLine
		if err := json.Unmarshal([]byte(text), &l); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		switch {
		case i == len(all)-1 && l.Stop != nil:
			return segments, *l.Stop
		case l.SegmentInfo == nil:
			t.Fatalf("line %d: %q", i, text)
		}
		segments = append(segments, *l.SegmentInfo)
	}
	t.Fatalf("the last line does not say where the log ends: %q", all[len(all)-1])
	return nil, stop
}

// TestInspection looks at one region with all that inspects: while its daemon
// runs, at a copy, after kill -9, after a bit flipped, after a clean end.
func TestInspection(t *testing.T) {
	t.Parallel()
	dir := directory(t)
	n := newNode(t, dir, "a", "", "")
	if out := must(t, "check", n.region); !strings.HasSuffix(out, ": sound\n") {
		t.Error(out)
	}
	if out := must(t, "info", n.region); !strings.Contains(out, "blank") || !strings.Contains(out, "closed") {
		t.Error(out)
	}
	n.start()
	for i := range 6 {
		if r := n.write(i*5000, bytes.Repeat([]byte{byte('a' + i)}, 3000)); r.code != exitDone {
			t.Fatalf("%+v", r)
		}
	}
	committed := n.status().Committed

	// Live. A checkpoint may have come in between; the last segment stays
	// only as long as none does, so what is there must be sound.
	segments, stop := lines(t, n.must("journal", "ls", "-o", "json"))
	if stop.End != committed || stop.Ending != nvmmirror.EndLive || stop.Damaged || stop.Segments != len(segments) {
		t.Errorf("live: %+v", stop)
	}
	if out := n.must("journal", "verify"); !strings.Contains(out, "live: ") {
		t.Error(out)
	}
	n.must("journal", "dump")
	fails(t, exitFailed, []string{"check", n.region}, n.region, "in use")
	fails(t, exitFailed, []string{"journal", "ls", n.region}, n.region, "in use")
	if out := must(t, "info", n.region); !strings.Contains(out, "in use by another process") {
		t.Error(out)
	}
	fails(t, exitUsage, []string{"journal", "ls", n.region, "--socket", n.socket}, "not both")

	// A copy, after a crash: it is what the daemon left.
	copied := filepath.Join(dir, "copy")
	write := func(b []byte) {
		t.Helper()
		if err := os.WriteFile(copied, b, 0o400); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(copied) })
	}
	var image []byte
	for tries := 0; ; tries++ {
		if r := n.write(100_000, bytes.Repeat([]byte("tail"), 2000)); r.code != exitDone {
			t.Fatalf("%+v", r)
		}
		n.kill()
		var err error
		if image, err = os.ReadFile(n.region); err != nil {
			t.Fatal(err)
		}
		write(image)
		segments, stop = lines(t, must(t, "journal", "dump", "-o", "json", copied))
		if stop.Damaged || stop.Ending != nvmmirror.EndOfLog || stop.End <= committed {
			t.Errorf("after a crash: %+v", stop)
		}
		if len(segments) > 0 {
			break
		}
		if tries == 10 {
			t.Fatal("each time a checkpoint came before the crash")
		}
		os.Remove(copied)
		n.start()
	}
	last := segments[len(segments)-1]
	if len(last.Records) != 1 || last.Records[0].Offset != 100_000 || last.Records[0].Length != 8000 || !strings.HasPrefix(last.Records[0].Data, "7461696c") || len(last.Records[0].Data) != 2*shownData {
		t.Errorf("%+v", last)
	}
	if out := must(t, "journal", "dump", copied); !strings.Contains(out, "8000 bytes at offset 100000: 7461696c") {
		t.Error(out)
	}
	must(t, "check", copied)
	var report nvmmirror.CheckReport
	if err := json.Unmarshal([]byte(must(t, "check", "-o", "json", copied)), &report); err != nil || report.Damaged || report.Blocks.Checked != regionSize/4096 || report.Recovery.End != stop.End {
		t.Errorf("%v, %+v", err, report)
	}

	// A bit flips in it.
	os.Remove(copied)
	damaged := bytes.Clone(image)
	damaged[last.Offset+100] ^= 1
	write(damaged)
	for _, args := range [][]string{{"check", copied}, {"check", "-o", "json", copied}, {"journal", "verify", copied}, {"journal", "ls", copied}} {
		fails(t, exitDamage, args, "damage")
	}
	if out := must(t, "info", copied); !strings.Contains(out, "damage: ") {
		t.Error(out)
	}
	if after, err := os.ReadFile(copied); err != nil || !bytes.Equal(after, damaged) {
		t.Error("an inspection changed the copy")
	}

	// A length that is wrong, and files that are no region.
	os.Remove(copied)
	write(image[:len(image)-1])
	fails(t, exitDamage, []string{"check", copied}, copied)
	fails(t, exitDamage, []string{"info", copied}, copied, "cut off")
	os.Remove(copied)
	write([]byte("something else"))
	for _, command := range []string{"info", "check"} {
		fails(t, exitUsage, []string{command, copied}, copied, "not an nvmmirror region")
	}
	fails(t, exitUsage, []string{"journal", "ls", copied}, copied, "not an nvmmirror region")

	n.start()
	n.stop(os.Interrupt)
	if out := must(t, "info", n.region); !strings.Contains(out, "closed cleanly") {
		t.Error(out)
	}
	must(t, "check", n.region)
}

// golden makes a region of testdata/regions in a new directory.
func golden(t *testing.T, name string) (path string) {
	t.Helper()
	f, err := os.Open(filepath.Join("../../testdata/regions", name+".nvm.gz"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	image, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(directory(t), name+".nvm")
	to, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(to, image); err != nil {
		t.Fatal(err)
	}
	if err := to.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

// A region that holds half of a full copy is not sound, though each byte is as
// it was written.
func TestCheckInconsistent(t *testing.T) {
	t.Parallel()
	path := golden(t, "inconsistent")
	r := fails(t, exitDamage, []string{"check", path}, path, "inconsistent", "peer")
	if !strings.HasSuffix(r.stdout, path+": INCONSISTENT: a full copy onto it did not finish; only its peer can complete it\n") {
		t.Error(r.stdout)
	}
	r = fails(t, exitDamage, []string{"check", "-o", "json", path}, "inconsistent")
	var report nvmmirror.CheckReport
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || report.Verdict != nvmmirror.Inconsistent || report.Consistent || report.Damaged {
		t.Errorf("%v, %+v", err, report)
	}
}
