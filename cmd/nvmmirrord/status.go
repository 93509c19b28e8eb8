package main

import (
	"fmt"
	"io"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/nvmmirror/nvmmirror/internal/admin"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// outputFlag is the -o flag of commands that inspect something.
func outputFlag(cmd *cobra.Command) *output {
	var o output
	cmd.Flags().VarP(&o, "output", "o", "json, else for humans")
	return &o
}

// output is "" or "json".
type output string

// Set implements pflag.Value.
func (o *output) Set(s string) error {
	if s != "json" && s != "text" {
		return fmt.Errorf("%q is not json or text", s)
	}
	*o = output(s)
	return nil
}

// String implements pflag.Value.
func (o *output) String() string { return string(*o) }

// Type implements pflag.Value.
func (o *output) Type() string { return "format" }

func (o *output) json() bool { return *o == "json" }

func newStatusCommand() *cobra.Command {
	var out *output
	cmd := withClient(&cobra.Command{
		Use:   "status",
		Short: "Show the state of the node and of its peer",
	}, func(cmd *cobra.Command, c *admin.Client) error {
		s, err := c.Status(cmd.Context())
		if err != nil {
			return err
		}
		if out.json() {
			return printJSON(cmd.OutOrStdout(), s)
		}
		return printStatus(cmd.OutOrStdout(), &s)
	})
	out = outputFlag(cmd)
	return cmd
}

func printStatus(to io.Writer, s *admin.Status) error {
	w := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(w, name+"\t"+format+"\n", args...) }
	volume, ring := size(s.Size), size(s.Journal)
	row("region", "%s  (volume %v, journal %v, class %s)", s.Path, &volume, &ring, s.Class)
	row("role", "%s, %s the title%s", s.Role, word(s.Title, "with", "without"), waits(*s))
	row("peer", "%s%s", s.Peer, word(s.Reason == "", "", "  ("+s.Reason+")"))
	if s.Transport != "" {
		row("transport", "%s, %d connection%s for long transactions%s", s.Transport, s.Lanes, word(s.Lanes == 1, "", "s"), word(s.Transport == transport.NamePlain, "  (nothing tells the peer from others but its address)", ""))
	}
	if s.Resync != nil {
		row("resync", "%d of %d bytes", s.Resync.Done, s.Resync.Total)
	}
	row("epoch", "%v", s.Epoch)
	row("ack", "%s, on peer loss %s", s.Ack, s.OnLoss)
	row("LSN", "committed %v, acknowledged %v, applied %v, checkpoint %v", s.Committed, s.Acked, s.Applied, s.Ckpt)
	row("lineage", "%v, node %s", s.Lineage, s.Node)
	r := &s.Recovery
	if r.End == 0 && r.Segments == 0 {
		row("recovery", "nothing was there")
	} else {
		row("recovery", "%s, %d transactions in %d segments from LSN %v to %v, applied to %v", word(r.Clean, "closed cleanly", "not closed cleanly"), r.Transactions, r.Segments, r.From, r.End, r.Applied)
	}
	if s.Daemon.Timeout != "" {
		row("timing", "peer timeout %s, heartbeat %s, read lease %s", s.Daemon.Timeout, s.Daemon.Heartbeat, s.Daemon.ReadLease)
	}
	row("daemon", "%s, process %d, since %s", s.Daemon.Version, s.Daemon.PID, s.Daemon.Started.Format("2006-01-02 15:04:05 MST"))
	row("counters", "%s", counterText(s))
	for i, d := range s.Degraded {
		row(word(i == 0, "degraded", ""), "%s", d)
	}
	if len(s.Degraded) == 0 {
		row("degraded", "no")
	}
	return w.Flush()
}

// counterText lists the counters that are not zero.
func counterText(s *admin.Status) string {
	c := &s.Counters
	var list []string
	for _, n := range []struct {
		name  string
		value uint64
	}{
		{"commits", c.Commits}, {"committed bytes", c.CommittedBytes}, {"reads", c.Reads}, {"checkpoints", c.Checkpoints},
		{"CRC failures", c.CRCFailures}, {"resends", c.Resends}, {"reconnects", c.Reconnects}, {"dial failures", c.DialFailures},
		{"refused handshakes", c.Refused}, {"bad blocks", c.BadBlocks}, {"repaired blocks", c.RepairedBlocks},
		{"unverified blocks", uint64(c.UnverifiedBlocks)}, {"scrubbed blocks", c.ScrubbedBlocks}, {"metadata repairs", c.MetadataRepairs}, {"MD5 failures", c.MD5Failures},
	} {
		if n.value > 0 {
			list = append(list, fmt.Sprintf("%s %d", n.name, n.value))
		}
	}
	if list == nil {
		return "all 0"
	}
	return strings.Join(list, ", ")
}
