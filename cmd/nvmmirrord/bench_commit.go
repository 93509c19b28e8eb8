package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/internal/bench"
)

func newBenchCommitCommand() *cobra.Command {
	o := bench.CommitOptions{}
	var poll pollFlag
	length, region, journal := size(64), size(1<<30), size(64<<20)
	cmd := &cobra.Command{
		Use:   "commit",
		Short: "Measure commits of a mirrored pair beside raw sockets",
		Long: `Run a mirrored pair in two processes on this machine and measure its commits,
each from call to return; each committer has one outstanding. In the same run,
in turns with the commits, measure raw sockets between the same two processes,
signed alike: messages of a transaction's size one way and 8 bytes back, with
one thread at each end and no other work, and a stream. The ratio of the two is
what the mirror costs. At the end both regions are compared, byte for byte.

A busy machine changes both, and the ratio less. The floor polls where the pair
does, and sleeps with --poll off or where both ends share a processor; its stream
always sleeps. Both are placed on the same processors: a wake-up on one processor
and one across two differ by more than all that the mirror does. Where --placement
leaves it to the scheduler, tails have no ratio; with several committers latencies
have none, since the floor has one message outstanding. With --ack async, rate and
CPU time hold the time until all is mirrored. The regions go to a directory that
is removed again.`,
		Args: cobra.NoArgs,
	}
	out := outputFlag(cmd)
	var ack, transport, placement string
	cmd.RunE = func(cmd *cobra.Command, _ []string) (err error) {
		o.Size, o.RegionSize, o.JournalSize = int(length), int64(region), int64(journal)
		o.Ack, o.Transport, o.Poll = nvmmirror.Ack(ack), bench.Transport(transport), time.Duration(poll)
		o.Placement = bench.Placement(placement)
		if o.Program, err = benchProgram(); err != nil {
			return err
		}
		ctx, stop := benchContext(cmd)
		defer stop()
		r, err := bench.Commit(ctx, o)
		if err != nil {
			return benchError(ctx, err)
		}
		if out.json() {
			return printJSON(cmd.OutOrStdout(), r)
		}
		return r.Print(cmd.OutOrStdout())
	}
	f := cmd.Flags()
	f.Var(&length, "size", "bytes of a transaction")
	f.IntVar(&o.Committers, "committers", 1, "how many commit at the same time")
	f.StringVar(&ack, "ack", string(nvmmirror.AckBoth), "both or async")
	f.StringVar(&transport, "transport", string(bench.MD5Sig), "md5sig, tls or plain")
	f.IntVar(&o.Connections, "connections", 1, "of the pair")
	f.Var(&poll, "poll", "how long a wait polls before it sleeps: a duration, off, or auto for the mirror's own")
	f.StringVar(&placement, "placement", string(bench.Auto), "of the nodes and the floor on processors: "+placements+"; auto is apart with one committer and one connection, else free")
	f.Var(&region, "region-size", "of the volume")
	f.Var(&journal, "journal-size", "of the journal")
	f.DurationVar(&o.Duration, "duration", 5*time.Second, "of the commits; the floor takes up to as long again")
	f.StringVar(&o.Profile, "profile", "", "write CPU profiles of both nodes to this name with .primary and .secondary added")
	f.StringVar(&o.Dir, "dir", "/dev/shm", "where the regions go")
	return cmd
}

// pollFlag is auto (0), off ([bench.PollOff]) or a duration.
type pollFlag time.Duration

// Set implements pflag.Value.
func (p *pollFlag) Set(text string) error {
	switch text {
	case "auto":
		*p = 0
	case "off":
		*p = pollFlag(bench.PollOff)
	default:
		d, err := time.ParseDuration(text)
		if err != nil || d < 0 {
			return fmt.Errorf("%q is not auto, off or a duration such as 50us", text)
		}
		if *p = pollFlag(d); d == 0 {
			*p = pollFlag(bench.PollOff)
		}
	}
	return nil
}

// String implements pflag.Value.
func (p *pollFlag) String() string {
	switch time.Duration(*p) {
	case 0:
		return "auto"
	case bench.PollOff:
		return "off"
	}
	return time.Duration(*p).String()
}

// Type implements pflag.Value.
func (p *pollFlag) Type() string { return "auto|duration|off" }
