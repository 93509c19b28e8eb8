package main

import (
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/nvmmirror/nvmmirror"
)

func newInfoCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "info PATH",
		Short: "Show what a region says of itself, and what recovery would do",
		Long: `Show a region's metadata, and what opening it would do. Nothing is written, and
the region may be in use: what is shown is then a moment's view. A copy of a
region file will do.`,
		Args: cobra.ExactArgs(1),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		i, err := nvmmirror.Inspect(args[0])
		if i != nil {
			// With an error, this is what could be read nevertheless.
			if err := printInspection(cmd.OutOrStdout(), i, out.json()); err != nil {
				return err
			}
		}
		return err
	}
	return cmd
}

func printInspection(to io.Writer, i *nvmmirror.Inspection, asJSON bool) error {
	if asJSON {
		return printJSON(to, i)
	}
	w := tabwriter.NewWriter(to, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) { fmt.Fprintf(w, name+"\t"+format+"\n", args...) }
	in := "closed"
	if i.InUse {
		in = "in use by another process"
	}
	row("region", "%s  (%s)", i.Path, in)
	for n, m := range i.Metadata {
		state := "older"
		switch {
		case !m.Valid:
			state = m.Error
		case m.Newest:
			state = "newest"
		}
		row(fmt.Sprintf("metadata %c", 'A'+n), "at %d, generation %d, %s", m.Offset, m.Generation, state)
	}
	if i.Expected != 0 {
		printState(row, i)
	}
	return w.Flush()
}

func printState(row func(name, format string, args ...any), i *nvmmirror.Inspection) {
	row("file", "%d bytes, %d expected, on %s memory, created on %s", i.Length, i.Expected, i.Class, i.Created)
	volume, ring := size(i.Size), size(i.Journal.Length)
	row("volume", "%v", &volume)
	row("areas", "journal %v at %d, block table at %d, data at %d", &ring, i.Journal.Offset, i.Table.Offset, i.Data.Offset)
	row("lineage", "%v%s", i.Lineage, word(i.Blank, "  (blank: not promoted yet)", ""))
	row("node", "%s%s", i.Node, word(i.Peer == "", "", ", last peer "+i.Peer))
	row("role", "%v, %s the title", i.Role, word(i.Title, "with", "without"))
	row("peer loss", "%s, read lease %s", i.OnLoss, i.ReadLease)
	row("state", "%s, %s", word(i.Clean, "closed cleanly", "not closed cleanly"), word(i.Consistent, "consistent", "inconsistent: a full copy has not finished"))
	row("checkpoint", "LSN %v, epoch %v", i.Checkpoint.LSN, i.Checkpoint.Epoch)
	row("acknowledged", "up to LSN %v at least", i.Acked)
	for n, e := range i.History {
		row(word(n == 0, "epochs", ""), "%v from LSN %v, %s%s", e.Epoch, e.Start, word(e.PeerIn, "peer in", "peer out"), word(e.Async, ", async", ""))
	}
	r := i.Recovery
	if r == nil {
		return
	}
	row("recovery", "%d transactions in %d segments from LSN %v to %v, applied to %v", r.Transactions, r.Segments, r.From, r.End, r.Apply)
	row("log ends", "%s: %s", r.Ending, r.Stop)
	if r.Ending == nvmmirror.EndTorn {
		row("", "known to be acknowledged up to LSN %v; beyond it, a crash and damage look the same from here", r.Acked)
	}
}

func word(b bool, yes, no string) string {
	if b {
		return yes
	}
	return no
}

func printJSON(to io.Writer, v any) error {
	e := json.NewEncoder(to)
	e.SetIndent("", "  ")
	return e.Encode(v)
}
