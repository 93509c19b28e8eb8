package main

import (
	"fmt"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/nvmmirror/nvmmirror/internal/bench"
	"github.com/nvmmirror/nvmmirror/internal/bench/report"
)

func newBenchReportCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "report DIR",
		Short: "Measure everything, and write a report with charts",
		Long: `Run the whole evaluation on this machine and write it to DIR: report.md with
tables and SVG charts, and report.json with every figure. What was there of an
earlier report is replaced.

Measured are the wire of "bench wire", over loopback and, as root, between
network namespaces at MTU 1500 and 9000; and the commits of "bench commit" at
64 B to 1 MiB, polling and sleeping, with 1 and 64 committers, over each
transport that a pair can have. With the default --duration this takes about
8 minutes. What the machine lacks is left out, and the report says so.

The machine should do nothing else: the report shows what it did in the second
before. --render measures nothing, and makes text and charts of the report.json
in DIR.`,
		Args: cobra.ExactArgs(1),
	}
	var duration time.Duration
	var regions string
	var parts []string
	var render bool
	var transports []string
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		dir := args[0]
		if render {
			if n := cmd.Flags().NFlag(); n > 1 {
				return usageErrorf("--render goes by itself: it measures nothing")
			}
			r, err := report.Read(dir)
			if err != nil {
				return err
			}
			return r.Write(dir)
		}
		o, left := report.Default(duration)
		o.Regions, o.Version = regions, versionText()
		var err error
		if o.Program, err = benchProgram(); err != nil {
			return err
		}
		if duration < time.Millisecond {
			return usageErrorf("--duration: %v is shorter than a millisecond", duration)
		}
		for _, p := range parts {
			if !slices.Contains(reportParts, p) {
				return usageErrorf("--parts: no part %q; there are loopback, namespaces and commit", p)
			}
		}
		left = slices.DeleteFunc(left, func(l report.Left) bool { return !slices.Contains(parts, l.Part) })
		if o.Loopback = slices.Contains(parts, "loopback"); !slices.Contains(parts, "namespaces") {
			o.MTUs = nil
		}
		if !slices.Contains(parts, "commit") {
			o.Pairs = nil
		}
		if len(transports) > 0 {
			var of []bench.Transport
			for _, name := range transports {
				t, err := bench.ParseTransport(name)
				if err != nil {
					return usageErrorf("--transports: %w", err)
				}
				of = append(of, t)
			}
			o.Transports = of
			o.Pairs = slices.DeleteFunc(o.Pairs, func(t bench.Transport) bool { return !slices.Contains(of, t) })
		}
		if !o.Loopback && len(o.MTUs)+len(o.Pairs) == 0 {
			return usageErrorf("--parts and --transports leave nothing to measure here")
		}
		// Minutes of measuring are not lost to a directory that cannot be had.
		if len(o.Pairs) == 0 {
			regions = ""
		}
		if err := report.Prepare(dir, regions); err != nil {
			return err
		}
		ctx, stop := benchContext(cmd)
		defer stop()
		progress, end := benchProgress(ctx, cmd.ErrOrStderr())
		o.Progress = progress
		r, err := report.Run(ctx, o, left)
		end()
		if err != nil {
			return benchError(ctx, err)
		}
		if err := r.Write(dir); err != nil {
			return err
		}
		if n := r.Failed(); n > 0 {
			return fmt.Errorf("%d measurements failed: see the end of %s/report.md", n, dir)
		}
		_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s/report.md, in %v\n", dir, time.Duration(r.Took*float64(time.Second)).Round(time.Second))
		return err
	}
	f := cmd.Flags()
	f.DurationVar(&duration, "duration", time.Second, "of each single measurement")
	f.StringVar(&regions, "dir", "/dev/shm", "where the pairs' regions go")
	f.StringSliceVar(&parts, "parts", reportParts, "what to measure")
	f.StringSliceVar(&transports, "transports", nil, "which ones only")
	f.BoolVar(&render, "render", false, "measure nothing, write DIR's report anew from its figures")
	return cmd
}

var reportParts = []string{"loopback", "namespaces", "commit"}
