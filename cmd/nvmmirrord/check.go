package main

import (
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/nvmmirror/nvmmirror"
)

func newCheckCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check PATH",
		Short: "Verify a closed region: metadata, journal, and each block",
		Long: `Verify a closed region, or a copy of one, without writing to it: both metadata
copies, the file's length, the journal from the checkpoint on, each block
against the block table.

Exit 0: sound. What a crash may leave, such as a torn tail, is listed and is
sound: the next open settles it. Exit 3: damage; or inconsistent, since a full
copy onto the region did not finish: part of it is old and part new, and only its
peer can complete it. Exit 2: it is no region, or needs a newer program. Exit 1:
it could not be checked, as when it is in use.`,
		Args: cobra.ExactArgs(1),
	}
	out := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		r, err := nvmmirror.Check(args[0])
		if err != nil {
			return err
		}
		if out.json() {
			err = printJSON(cmd.OutOrStdout(), r)
		} else {
			err = printCheck(cmd.OutOrStdout(), r)
		}
		switch {
		case err != nil:
			return err
		case r.Damaged:
			return damageErrorf("%s: damage found: once both nodes are served the peer repairs the journal, and each block within a day, or as soon as it is read or changed; what is beyond repair, restore or create anew", r.Path)
		case r.Verdict != nvmmirror.Sound:
			return damageErrorf("%s: inconsistent: serve it with its peer, which copies to it anew; without the peer its blocks are a mixture of old and new", r.Path)
		}
		return nil
	}
	return cmd
}

func printCheck(w io.Writer, r *nvmmirror.CheckReport) error {
	for _, f := range r.Findings {
		kind := "note"
		if f.Damage {
			kind = "DAMAGE"
		}
		fmt.Fprintf(w, "%-6s  %s at byte %d: %s\n", kind, f.Area, f.Offset, f.Problem)
	}
	if r.Omitted > 0 {
		fmt.Fprintf(w, "and %d findings more\n", r.Omitted)
	}
	if l := r.Log; l != nil {
		fmt.Fprintf(w, "journal  %d transactions in %d segments from LSN %v to %v, %s: %s\n", l.Transactions, l.Segments, l.From, l.End, l.Ending, l.Reason)
	}
	b := r.Blocks
	fmt.Fprintf(w, "blocks   %d checked, %d damaged", b.Checked, b.Damaged)
	if b.Unverified > 0 {
		fmt.Fprintf(w, ", %d not compared with the peer since a crash", b.Unverified)
	}
	if b.Rewritten > 0 {
		fmt.Fprintf(w, ", %d not judged: the next recovery changes them", b.Rewritten)
	}
	verdict := string(r.Verdict)
	switch r.Verdict {
	case nvmmirror.Damaged:
		verdict = "DAMAGED"
	case nvmmirror.Inconsistent:
		verdict = "INCONSISTENT: a full copy onto it did not finish; only its peer can complete it"
	}
	_, err := fmt.Fprintf(w, "\n%s: %s\n", r.Path, verdict)
	return err
}
