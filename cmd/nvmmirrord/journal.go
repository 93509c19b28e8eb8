package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/internal/admin"
)

// shownData is how many bytes of a record's data dump shows.
const shownData = 256

func newJournalCommand() *cobra.Command {
	cmd := newGroup("journal", "Look into a journal: of a closed region, of a copy, or of a running daemon")
	cmd.AddCommand(
		newJournalMode("ls", "List the segments, and where and why the log ends"),
		newJournalMode("dump", fmt.Sprintf("List the segments with their records, and up to %d bytes of each in hexadecimal", shownData)),
		newJournalMode("verify", "Verify each segment; list what is wrong, and where and why the log ends"),
	)
	return cmd
}

func newJournalMode(mode, short string) *cobra.Command {
	cmd := &cobra.Command{
		Use:   mode + " [PATH]",
		Short: short,
		Long: short + `.

PATH is a closed region or a copy of one; without it, a daemon is asked. Nothing
is written. Shown is the live journal: from the checkpoint on, as recovery reads
it. What lies below is applied and only waits to be overwritten. Behind damage,
whole segments that recovery cannot reach are shown as unreachable. With -o json
each line is an object; the last one has "stop": where the log ends and why.
Exit 3: damage. A torn tail after a crash is not damage.`,
		Args: cobra.MaximumNArgs(1),
	}
	out := outputFlag(cmd)
	socket := socketFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 && *socket != "" {
			return usageErrorf("give a path or --socket, not both")
		}
		p := &journalPrinter{w: cmd.OutOrStdout(), json: out.json()}
		var err error
		if len(args) > 0 {
			err = p.offline(args[0], mode)
		} else {
			err = p.live(cmd.Context(), *socket, mode)
		}
		if err != nil {
			return err
		}
		return p.verdict()
	}
	return cmd
}

func journalOptions(mode string) nvmmirror.JournalOptions {
	return nvmmirror.JournalOptions{Records: mode == "dump", Data: shownData}
}

// shown says whether a segment is listed.
func shown(mode string, s *nvmmirror.SegmentInfo) bool {
	return mode != "verify" || len(s.Problems) > 0 || s.State != "ok"
}

// writeLiveJournal is an [admin.JournalFunc]: what the daemon answers with.
func writeLiveJournal(ctx context.Context, w io.Writer, v *nvmmirror.Volume, mode string) error {
	e := json.NewEncoder(w)
	stop, err := v.InspectJournal(ctx, journalOptions(mode), func(s *nvmmirror.SegmentInfo) error {
		if !shown(mode, s) {
			return nil
		}
		return e.Encode(nvmmirror.JournalLine{SegmentInfo: s})
	})
	if err != nil {
		return err
	}
	return e.Encode(nvmmirror.JournalLine{Stop: stop})
}

// journalPrinter prints lines as they come.
type journalPrinter struct {
	w      io.Writer
	json   bool
	header bool // printed
	stop   *nvmmirror.JournalStop
	rest   []byte // of a line that has not come whole
}

func (p *journalPrinter) offline(path, mode string) error {
	stop, err := nvmmirror.InspectJournal(path, journalOptions(mode), func(s *nvmmirror.SegmentInfo) error {
		if !shown(mode, s) {
			return nil
		}
		return p.line(nvmmirror.JournalLine{SegmentInfo: s})
	})
	if err != nil {
		return err
	}
	return p.line(nvmmirror.JournalLine{Stop: stop})
}

func (p *journalPrinter) live(ctx context.Context, socket, mode string) error {
	c, err := dial(socket, admin.FindSocket)
	if err != nil {
		return err
	}
	defer c.Close()
	return c.Journal(ctx, mode, p)
}

// Write takes JSON lines from the daemon.
func (p *journalPrinter) Write(b []byte) (int, error) {
	p.rest = append(p.rest, b...)
	for {
		line, rest, whole := bytes.Cut(p.rest, []byte("\n"))
		if !whole {
			return len(b), nil
		}
		var l nvmmirror.JournalLine
		if err := json.Unmarshal(line, &l); err != nil {
			return 0, fmt.Errorf("the daemon's answer is not understood: %w", err)
		}
		if err := p.line(l); err != nil {
			return 0, err
		}
		p.rest = rest
	}
}

func (p *journalPrinter) line(l nvmmirror.JournalLine) error {
	if l.Stop != nil {
		p.stop = l.Stop
	}
	if p.json {
		return json.NewEncoder(p.w).Encode(l)
	}
	if l.Stop != nil {
		s := l.Stop
		_, err := fmt.Fprintf(p.w, "%d transactions in %d segments; from the checkpoint at LSN %v the log goes to LSN %v, acknowledged up to %v at least\n%s: %s\n",
			s.Transactions, s.Segments, s.From, s.End, s.Acked, s.Ending, s.Reason)
		return err
	}
	if l.SegmentInfo == nil {
		return nil
	}
	return p.segment(l.SegmentInfo)
}

func (p *journalPrinter) segment(s *nvmmirror.SegmentInfo) error {
	if !p.header {
		p.header = true
		fmt.Fprintf(p.w, "%-14s %-14s %-22s %-8s %5s %9s %12s %-9s %s\n", "LSN", "END", "EPOCH", "KIND", "TXS", "BYTES", "OFFSET", "CRC", "STATE")
	}
	_, err := fmt.Fprintf(p.w, "%-14v %-14v %-22v %-8s %5d %9d %12d %-9s %s\n", s.LSN, s.End, s.Epoch, s.Kind, s.Transactions, s.Bytes, s.Offset, s.CRC, s.State)
	for _, problem := range s.Problems {
		fmt.Fprintf(p.w, "  DAMAGE: %s\n", problem)
	}
	for _, r := range s.Records {
		cut := ""
		if len(r.Data) < 2*r.Length {
			cut = "..."
		}
		fmt.Fprintf(p.w, "  transaction %d: %d bytes at offset %d: %s%s\n", r.Transaction, r.Length, r.Offset, r.Data, cut)
	}
	return err
}

// verdict is the command's error, going by the last line.
func (p *journalPrinter) verdict() error {
	switch {
	case p.stop == nil:
		return fmt.Errorf("the answer ends without saying where the log ends: the daemon was stopped; look again")
	case p.stop.Damaged:
		return damageErrorf("the journal is damaged: %s; reopen the region with its peer, which can repair it", p.stop.Reason)
	case p.stop.Ending == nvmmirror.EndNewer:
		return &nvmmirror.NewerError{Detail: p.stop.Reason}
	}
	return nil
}
