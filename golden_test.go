package nvmmirror

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite what golden tests expect; makes golden regions that are missing, and never replaces one")

const goldenDir = "testdata/regions"

// golden is what is expected of a golden region.
type golden struct {
	Inspection *Inspection   `json:"inspection"`
	Check      *CheckReport  `json:"check"`
	CheckError string        `json:"check_error"`
	Segments   []SegmentInfo `json:"segments"`
	Stop       *JournalStop  `json:"stop"`
	Open       goldenOpen    `json:"open"`
}

// goldenOpen is what opening the region does.
type goldenOpen struct {
	Error    string    `json:"error"`
	Recovery *Recovery `json:"recovery,omitempty"`
	SHA256   string    `json:"content_sha256,omitempty"`
}

// TestGoldenRegions opens regions that earlier versions wrote. Each is one
// that every later version must read as it was read then.
func TestGoldenRegions(t *testing.T) {
	for _, name := range []string{"clean", "torn", "damaged", "newer", "inconsistent"} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(goldenDir, name+".nvm.gz")
			if _, err := os.Stat(file); err != nil && *update {
				makeGolden(t, name, file)
			}
			path := unpack(t, file)
			got := read(t, path)
			text, err := json.MarshalIndent(got, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			text = append(bytes.ReplaceAll(text, []byte(path), []byte("REGION")), '\n')
			expect := filepath.Join(goldenDir, name+".json")
			if *update {
				if err := os.WriteFile(expect, text, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(expect)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(string(text), "\n")); d != "" {
				t.Errorf("-expected +found:\n%s", d)
			}
		})
	}
}

// read looks at a region in every way, last by opening it.
func read(t *testing.T, path string) (g golden) {
	t.Helper()
	g.Inspection, _ = Inspect(path)
	var err error
	if g.Check, err = Check(path); err != nil {
		g.CheckError = err.Error()
	} else {
		g.Check.Inspection = Inspection{}
	}
	g.Stop, err = InspectJournal(path, JournalOptions{Records: true, Data: 8}, func(s *SegmentInfo) error {
		g.Segments = append(g.Segments, *s)
		return nil
	})
	if err != nil && g.CheckError == "" {
		t.Error(err)
	}
	v, err := Open(path, Options{})
	if err != nil {
		g.Open.Error = err.Error()
		return g
	}
	defer v.Close()
	g.Open.Recovery = &v.recovery
	if p := make([]byte, v.Size()); !v.copying {
		if _, err := v.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
		sum := sha256.Sum256(p)
		g.Open.SHA256 = hex.EncodeToString(sum[:])
	}
	return g
}

func unpack(t *testing.T, file string) (path string) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	image, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return writeRegion(t, image)
}

// makeGolden writes a golden region with this version's code.
func makeGolden(t *testing.T, name, file string) {
	t.Helper()
	c := makeCrashed(t)
	var image []byte
	switch last := len(c.states) - 1; name {
	case "clean":
		image = c.clean
	case "torn": // the end of the last segment never became persistent
		image = bytes.Clone(c.pending)
		lo, hi := c.ringSpan(last)
		clear(image[(lo+hi)/2 : hi])
	case "damaged":
		image = flipped(c.applied, c, last-5)
	case "newer":
		image = bytes.Clone(c.clean)
		forgeMetadata(image, func(b []byte) { b[8]++ })
	case "inconsistent":
		image = inconsistentImage(t, c)
	}
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		t.Fatal(err)
	}
	z.Write(image)
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if b.Len() > 100<<10 {
		t.Fatalf("%s has %d bytes", file, b.Len())
	}
	if err := os.MkdirAll(goldenDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
}
