package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/internal/admin"
)

const defaultChunk = size(1 << 20)

func newWriteCommand() *cobra.Command {
	var offset size
	chunk := defaultChunk
	var timeout time.Duration
	cmd := toChange(&cobra.Command{
		Use:   "write --offset N < FILE",
		Short: "Write standard input to a primary's volume, a transaction per chunk",
		Long: `Write standard input to a primary's volume, one transaction per chunk, one after
the other. It prints the last LSN that was acknowledged: all chunks up to there
are durable on every required node.

Where the wait for an acknowledgement ends early, the outcome of that one chunk
is unknown; it says so, and what was acknowledged before it, exit 1.`,
	}, func(cmd *cobra.Command, c *admin.Client) error {
		if chunk <= 0 || timeout < 0 {
			return usageErrorf("--chunk %v --timeout %v: nothing could be written", &chunk, timeout)
		}
		s, err := c.Status(cmd.Context())
		if err != nil {
			return err
		}
		if most := size(s.Daemon.MaxTransaction); chunk > most {
			if cmd.Flags().Changed("chunk") {
				return usageErrorf("--chunk is %v, a transaction of this volume holds at most %d bytes", &chunk, most)
			}
			chunk = most
		}
		w := writer{c: c, off: int64(offset), timeout: timeout}
		err = w.copy(cmd.Context(), cmd.InOrStdin(), int(chunk))
		if w.chunks > 0 {
			fmt.Fprintln(cmd.OutOrStdout(), w.acked)
		}
		if err != nil {
			return w.explain(err)
		}
		if w.chunks == 0 && s.Role != "primary" {
			return fmt.Errorf("standard input was empty; and this node is a %s: only a primary takes data", s.Role)
		}
		if w.chunks == 0 {
			fmt.Fprintln(cmd.ErrOrStderr(), "nvmmirrord: standard input was empty, nothing was written")
		}
		return nil
	})
	f := cmd.Flags()
	f.Var(&offset, "offset", "where to start, such as 4096 or 1MiB (required)")
	f.Var(&chunk, "chunk", "bytes of a transaction, less than a quarter of the journal and than 64MiB")
	f.DurationVar(&timeout, "timeout", 0, "how long each transaction may wait for its acknowledgement (0: for ever)")
	cmd.MarkFlagRequired("offset") // the flag exists
	return cmd
}

// writer writes chunks one after the other.
type writer struct {
	c       *admin.Client
	off     int64 // of the next chunk
	timeout time.Duration

	chunks int // acknowledged
	bytes  int64
	acked  nvmmirror.LSN
}

// chunk is a piece of the input. err comes with its last one.
type chunk struct {
	p   []byte
	err error
}

// copy writes all of r. The next chunk is read while one is committed.
func (w *writer) copy(ctx context.Context, r io.Reader, size int) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	full, free := make(chan chunk), make(chan []byte, 2)
	free <- make([]byte, size)
	free <- make([]byte, size)
	// A read of a terminal or a pipe cannot be interrupted; the process ends
	// over it.
	go func() {
		for p := range free {
			n, err := io.ReadFull(r, p[:size])
			if errors.Is(err, io.ErrUnexpectedEOF) {
				err = io.EOF
			}
			select {
			case full <- chunk{p[:n], err}:
			case <-ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	defer close(free)
	for {
		select {
		case c := <-full:
			if len(c.p) > 0 {
				lsn, err := w.c.Write(ctx, w.off, c.p, w.timeout)
				if err != nil {
					return err
				}
				w.acked, w.chunks = lsn, w.chunks+1
				w.bytes, w.off = w.bytes+int64(len(c.p)), w.off+int64(len(c.p))
			}
			if c.err != nil && !errors.Is(c.err, io.EOF) {
				return fmt.Errorf("standard input: %w", c.err)
			}
			if c.err != nil {
				return nil
			}
			free <- c.p
		case <-ctx.Done():
			return errors.New("interrupted")
		}
	}
}

// explain says what became of the chunks.
func (w *writer) explain(err error) error {
	what := "the chunk at offset %d was not written: %w"
	if admin.IsOutcomeUnknown(err) {
		what = "the chunk at offset %d: %w"
	}
	what += "; acknowledged before it: %d transactions of %d bytes"
	args := []any{w.off, err, w.chunks, w.bytes}
	if w.chunks > 0 {
		what += ", up to LSN %v"
		args = append(args, w.acked)
	}
	return fmt.Errorf(what, args...)
}
