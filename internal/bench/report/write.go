package report

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
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
	return r, nil
}

// Prepare makes the directory, and sees that a report can be written there.
func Prepare(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
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
	if err := os.WriteFile(filepath.Join(dir, dataFile), append(data, '\n'), 0o644); err != nil {
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
