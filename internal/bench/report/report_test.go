package report

import (
	"bytes"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror/internal/bench"
)

const childArgument = "bench-child"

// TestMain makes the test binary the other end, where it is started as that.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == childArgument {
		if err := bench.ServeChild(os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func short(t *testing.T) Options {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	regions, err := os.MkdirTemp("/dev/shm", "nvmmirror-test-")
	if err != nil {
		t.Skip("needs /dev/shm: ", err)
	}
	t.Cleanup(func() { os.RemoveAll(regions) })
	return Options{
		Duration: 10 * time.Millisecond, Transports: []bench.Transport{bench.Plain, bench.CRC32C}, Sizes: []int{64, 8192}, Connections: []int{1, 2}, Loopback: true,
		Pairs: []bench.Transport{bench.Plain}, CommitSizes: []int{64}, Committers: []int{1, 2}, PairConnections: []int{2}, RegionSize: 4 << 20, JournalSize: 2 << 20,
		Regions: regions, Program: []string{self, childArgument}, Version: "test",
	}
}

// A report is whole: each chart that the text shows is there and can be read,
// and the text can be made again of the figures alone.
func TestReport(t *testing.T) {
	o := short(t)
	var told []time.Duration
	o.Progress = func(done, total time.Duration, what string) {
		if done > total || what == "" {
			t.Errorf("%v of %v: %q", done, total, what)
		}
		told = append(told, done)
	}
	r, err := Run(t.Context(), o, []Left{{Part: "namespaces", What: "something", Why: "a reason"}})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Paths) != 1 || len(r.Commits) != 6 || r.Failed() != 0 {
		t.Fatalf("%d paths, %d commits, left out %v", len(r.Paths), len(r.Commits), r.Left)
	}
	// 2 transports with 4 round trips and 2 streams, 6 pairs, and the end.
	if len(told) != 2*6+6+1 || told[len(told)-1] == 0 {
		t.Errorf("progress %v", told)
	}
	dir := filepath.Join(t.TempDir(), "new")
	if err := r.Write(dir); err != nil {
		t.Fatal(err)
	}
	text := read(t, dir, textFile)
	for _, want := range []string{"plain", "crc32c", "64 B", "8 KiB", "together", "skipped: a reason", "congestion control"} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	if strings.Contains(text, "NaN") || strings.Contains(text, "Inf") || strings.Contains(text, "%!") {
		t.Errorf("%s", text)
	}
	shown := regexp.MustCompile(`\]\(([^)]*\.svg)\)`).FindAllStringSubmatch(text, -1)
	files, err := filepath.Glob(filepath.Join(dir, "*.svg"))
	if err != nil {
		t.Fatal(err)
	}
	if len(shown) != len(files) || len(shown) < 6 {
		t.Errorf("%d charts are shown, %d are there", len(shown), len(files))
	}
	for _, m := range shown {
		wellFormed(t, read(t, dir, m[1]))
	}
	// A chart of an earlier report does not stay, other files do.
	for _, name := range []string{"round-trip-mtu77.svg", "photograph.svg"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	again, err := Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := again.Write(dir); err != nil {
		t.Fatal(err)
	}
	if got := read(t, dir, textFile); got != text {
		t.Errorf("rendered again it differs:\n%s", got)
	}
	if _, err := os.Stat(filepath.Join(dir, "round-trip-mtu77.svg")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("an old chart: %v", err)
	}
	if _, err := os.Stat(filepath.Join(dir, "photograph.svg")); err != nil {
		t.Error(err)
	}
}

// One measurement that fails is said, and the others are there.
func TestReportGoesOn(t *testing.T) {
	o := short(t)
	o.Loopback = false
	o.CommitSizes = []int{64, 3 << 20} // the latter do not fit into the journal
	r, err := Run(t.Context(), o, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Commits) != 5 || r.Failed() != 6 {
		t.Fatalf("%d commits, left out %v", len(r.Commits), r.Left)
	}
	dir := t.TempDir()
	if err := r.Write(dir); err != nil {
		t.Fatal(err)
	}
	if text := read(t, dir, textFile); !strings.Contains(text, "**failed**") {
		t.Errorf("%s", text)
	}
}

// A report that does not fit on the disk leaves the figures of the one before.
func TestReportOnAFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skip("needs root: ", err)
	}
	defer unix.Unmount(dir, 0)
	old := &Report{Version: "old", Host: &bench.Host{}}
	if err := old.Write(dir); err != nil {
		t.Fatal(err)
	}
	figures := read(t, dir, dataFile)
	large := &Report{Version: strings.Repeat("new", 100<<10), Host: &bench.Host{}}
	if err := large.Write(dir); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("%v", err)
	}
	if got := read(t, dir, dataFile); got != figures {
		t.Errorf("of %d bytes %d are left", len(figures), len(got))
	}
	if err := old.Write(dir); err != nil { // nothing that is left takes the room
		t.Error(err)
	}
}

func TestReadRefuses(t *testing.T) {
	dir := t.TempDir()
	if _, err := Read(dir); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	for _, content := range []string{"", "{}", "[]", `{"host":{},"commits":[null]}`} {
		if err := os.WriteFile(filepath.Join(dir, dataFile), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := Read(dir); err == nil {
			t.Errorf("%q is a report", content)
		}
	}
}

func read(t *testing.T, dir, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func wellFormed(t *testing.T, text string) {
	t.Helper()
	d := xml.NewDecoder(bytes.NewReader([]byte(text)))
	texts := 0
	for {
		token, err := d.Token()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		e, ok := token.(xml.StartElement)
		if !ok || e.Name.Local != "text" {
			continue
		}
		texts++
		if len(e.Attr) == 0 || e.Attr[0].Name.Local != "textLength" || e.Attr[0].Value == "0.0" {
			t.Errorf("a text of any width: %v", e.Attr)
		}
	}
	if texts < 5 || strings.Contains(text, "NaN") {
		t.Errorf("%d texts, or what is not a number, in\n%s", texts, text)
	}
}
