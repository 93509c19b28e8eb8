package main

import (
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

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
calls on the connections for each GiB at both ends; memory. What arrives is
compared with what was sent.

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
	var address, verify, placement string
	var transports []string
	var sizes []string
	cmd.RunE = func(cmd *cobra.Command, _ []string) (err error) {
		// A flag that would change nothing is a misunderstanding.
		cmd.Flags().Visit(func(f *pflag.Flag) {
			switch {
			case server && f.Name != "server" && f.Name != "listen":
				err = usageErrorf("--%s is for the driver: the server does what that asks for", f.Name)
			case !server && f.Name == "listen":
				err = usageErrorf("--listen is for --server")
			case !server && !apart && f.Name == "mtu":
				err = usageErrorf("--mtu is for --netns")
			}
		})
		if err != nil {
			return err
		}
		if server {
			if err := bench.ServeWire(cmd.Context(), address, cmd.OutOrStdout()); err != nil {
				return benchError(cmd.Context(), err)
			}
			return nil
		}
		o.Verify, o.Placement = bench.Verify(verify), bench.Placement(placement)
		if !apart {
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
			return benchError(cmd.Context(), err)
		}
		progress, end := benchProgress(cmd.Context(), cmd.ErrOrStderr())
		// Each measurement takes as long, so that is the unit.
		o.Progress = func(done, total int, what string) {
			progress(time.Duration(done)*o.Duration, time.Duration(total)*o.Duration, what)
		}
		r, err := bench.Wire(cmd.Context(), o)
		end()
		if err != nil {
			return benchError(cmd.Context(), err)
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
	f.StringVar(&verify, "verify", string(bench.VerifySample), "what the receiver of a timed stream compares: all bytes, or those of a sample, each 16th message; all else is compared wholly")
	f.StringVar(&placement, "placement", string(bench.Auto), "of the round trips' ends on this machine's processors: "+placements+"; auto is apart")
	cmd.MarkFlagsMutuallyExclusive("server", "client", "netns")
	return cmd
}
