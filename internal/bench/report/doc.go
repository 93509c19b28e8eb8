// Package report runs the whole evaluation and writes it down: report.md with
// tables, remarks and SVG charts, and report.json with every figure.
//
// The JSON is the source: [Report.Write] makes the rest of it alone, so that a report
// can be rendered again without measuring again. A remark is made of figures of
// the run; nothing is claimed that they do not show.
package report
