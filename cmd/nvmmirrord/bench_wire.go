package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror/internal/bench"
)

const wirePort = "7450"

func newBenchWireCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "wire",
		Short: "Measure transports against each other: plain, MD5SIG, MD5 and CRC in userspace, TLS",
		Long: `Measure what carries a mirror's bytes: plain TCP, TCP_MD5SIG, plain TCP with MD5
in userspace or through the kernel's AF_ALG, with CRC-32C, and TLS 1.3. For each:
the round trip by message size (that many bytes out, 8 back), sleeping and
polling; throughput by connections, with CPU time, context switches and system
calls for each GiB at both ends; memory. What arrives is compared with what was
sent.

Both ends run on this machine over loopback, unless one host is given --server
and another --client with its address. The server does what any client asks
for, and keys made for the run cross the control connection in clear: run it on
a network that you trust, and end it afterwards. The data goes over ports that
the server's kernel chooses.

With --netns, as root, both ends run on this machine in network namespaces of
their own with a veth between them, at each --mtu.`,
		Args: cobra.NoArgs,
	}
	out := outputFlag(cmd)
	var o bench.WireOptions
	var server, apart bool
	var address, verify string
	var transports []string
	var sizes []string
	cmd.RunE = func(cmd *cobra.Command, _ []string) (err error) {
		if server {
			return bench.ServeWire(cmd.Context(), address, cmd.OutOrStdout())
		}
		if o.Verify = bench.Verify(verify); !apart {
			o.MTUs = nil
		}
		for _, name := range transports {
			t, err := bench.ParseTransport(name)
			if err != nil {
				return usageErrorf("--transports: %w", err)
			}
			o.Transports = append(o.Transports, t)
		}
		for _, text := range sizes {
			var n size
			if err := n.Set(text); err != nil {
				return usageErrorf("--sizes: %w", err)
			}
			o.Sizes = append(o.Sizes, int(n))
		}
		if o.Program, err = benchProgram(); err != nil {
			return err
		}
		// What does not fit is known before a bar is shown.
		if err := o.Check(); err != nil {
			return benchError(err)
		}
		var end func()
		o.Progress, end = benchProgress(cmd.Context(), cmd.ErrOrStderr())
		r, err := bench.Wire(cmd.Context(), o)
		end()
		if err != nil {
			return benchError(err)
		}
		if out.json() {
			return printJSON(cmd.OutOrStdout(), r)
		}
		return r.Print(cmd.OutOrStdout())
	}
	f := cmd.Flags()
	f.BoolVar(&server, "server", false, "be the other end for a --client on another host, until interrupted")
	f.StringVar(&address, "listen", ":"+wirePort, "the server's address and port")
	f.StringVar(&o.Client, "client", "", "address and port of a server on another host")
	f.BoolVar(&apart, "netns", false, "between two network namespaces of this machine, as root")
	f.IntSliceVar(&o.MTUs, "mtu", []int{1500, 9000}, "with --netns: of the veth, one run for each")
	var names, lengths []string
	for _, t := range bench.Transports() {
		names = append(names, string(t))
	}
	for _, n := range bench.DefaultSizes {
		n := size(n)
		lengths = append(lengths, n.String())
	}
	f.StringSliceVar(&transports, "transports", names, "which ones")
	f.StringSliceVar(&sizes, "sizes", lengths, "of the round trips' messages")
	f.IntSliceVar(&o.Connections, "connections", bench.DefaultConnections, "of the streams")
	f.DurationVar(&o.Duration, "duration", 500*time.Millisecond, "of each single measurement")
	f.StringVar(&verify, "verify", string(bench.VerifyAll), "what the receiver compares: all bytes, or those of a sample, each 16th message")
	cmd.MarkFlagsMutuallyExclusive("server", "client", "netns")
	return cmd
}

// benchProgress shows a bar where to is a terminal. end must be called.
func benchProgress(ctx context.Context, to io.Writer) (progress func(done, total int, what string), end func()) {
	f, ok := to.(*os.File)
	if !ok {
		return nil, func() {}
	}
	if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err != nil {
		return nil, func() {}
	}
	p := mpb.NewWithContext(ctx, mpb.WithOutput(f), mpb.WithWidth(40))
	doing := ""
	var bar *mpb.Bar
	progress = func(done, total int, what string) {
		if bar == nil {
			bar = p.AddBar(int64(total), mpb.BarRemoveOnComplete(),
				mpb.PrependDecorators(decor.Percentage(decor.WCSyncSpace)),
				mpb.AppendDecorators(decor.AverageETA(decor.ET_STYLE_GO, decor.WCSyncSpace), decor.Any(func(decor.Statistics) string { return "  " + doing })))
		}
		doing = fmt.Sprintf("%-48s", what)
		bar.SetCurrent(int64(done))
	}
	return progress, func() {
		if bar != nil {
			bar.Abort(true)
		}
		p.Wait()
	}
}
