package report

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
)

const (
	dataFile = "report.json"
	textFile = "report.md"
	tailSize = 64 // whose distribution is drawn
)

// Read is the report of a directory.
func Read(dir string) (*Report, error) {
	b, err := os.ReadFile(filepath.Join(dir, dataFile))
	if err != nil {
		return nil, err
	}
	r := &Report{}
	if err := json.Unmarshal(b, r); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, dataFile), err)
	}
	if r.Host == nil {
		return nil, fmt.Errorf("%s is not a report: it describes no machine", filepath.Join(dir, dataFile))
	}
	if i := slices.Index(r.Commits, nil); i >= 0 {
		return nil, fmt.Errorf("%s is not a report: number %d of its commits is null; measure anew, without --render", filepath.Join(dir, dataFile), i+1)
	}
	return r, nil
}

// Prepare makes the directory, and sees that a report can be written there, and
// regions to theirs, "" where there are none.
func Prepare(dir, regions string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if regions != "" {
		if err := writable(regions); err != nil {
			return fmt.Errorf("--dir: %w", err)
		}
	}
	return writable(dir)
}

func writable(dir string) error {
	f, err := os.CreateTemp(dir, ".report-")
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// Write makes the directory's report, in place of one that was there.
func (r *Report) Write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	data, err := json.MarshalIndent(r, "", " ")
	if err != nil {
		return err
	}
	// The figures first: whatever else fails, they are not lost.
	if err := replace(filepath.Join(dir, dataFile), append(data, '\n')); err != nil {
		return err
	}
	charts, err := r.charts()
	if err != nil {
		return err
	}
	if err := removeCharts(dir); err != nil {
		return err
	}
	for _, c := range charts {
		b, err := svg(c.panels...)
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(dir, c.file), b, 0o644); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(dir, textFile), []byte(r.markdown(charts)), 0o644)
}

// replace writes a file in place of one that was there, which stays where that
// fails: of a full disk the measurements of before are not the price.
func replace(path string, data []byte) error {
	err := os.WriteFile(path+".new", data, 0o644)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		os.Remove(path + ".new")
	}
	return err
}

// removeCharts removes what an earlier report left that this one may not have.
func removeCharts(dir string) (err error) {
	for _, pattern := range []string{"round-trip-*.svg", "tail-*.svg", "throughput.svg", "cpu.svg", "memory.svg", "sockets.svg", "commit-*.svg"} {
		names, _ := filepath.Glob(filepath.Join(dir, pattern)) // the pattern is well-formed
		for _, name := range names {
			err = errors.Join(err, os.Remove(name))
		}
	}
	return err
}
