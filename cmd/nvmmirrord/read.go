package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/nvmmirror/nvmmirror/internal/admin"
	"github.com/nvmmirror/nvmmirror/replicate"
)

func newReadCommand() *cobra.Command {
	var offset, length size
	var skip bool
	cmd := withClient(&cobra.Command{
		Use:   "read --offset N --length L",
		Short: "Read bytes of a primary's volume to standard output",
		Long: fmt.Sprintf(`Read bytes of a primary's volume to standard output, verified by their
checksums. Each piece of %d MiB is of one moment; around a damaged block each
block is.

At a damaged block, which the peer cannot replace, it ends with exit 3; what
precedes the block has been written. With --skip-damaged it writes zeros for
such a block, lists it on standard error, goes on, and ends with exit 3.`, admin.MaxRead>>20),
	}, func(cmd *cobra.Command, c *admin.Client) error {
		s, err := c.Status(cmd.Context())
		if err != nil {
			return err
		}
		if int64(offset) > s.Size || int64(length) > s.Size-int64(offset) {
			return usageErrorf("%d bytes at offset %d are beyond the end of the volume, which has %d", length, offset, s.Size)
		}
		r := reader{c: c, out: cmd.OutOrStdout(), errs: cmd.ErrOrStderr(), skip: skip}
		if err := r.copy(cmd.Context(), int64(offset), int64(length)); err != nil {
			return err
		}
		if r.damaged > 0 {
			return damageErrorf("%d damaged blocks, for which zeros were written", r.damaged)
		}
		return nil
	})
	cmd.Flags().Var(&offset, "offset", "where to start, such as 4096 or 1MiB (required)")
	cmd.Flags().Var(&length, "length", "how many bytes (required)")
	cmd.Flags().BoolVar(&skip, "skip-damaged", false, "write zeros for damaged blocks, and go on")
	cmd.MarkFlagRequired("offset") // the flags exist
	cmd.MarkFlagRequired("length")
	return cmd
}

// reader copies a part of a volume.
type reader struct {
	c         *admin.Client
	out, errs io.Writer
	skip      bool
	damaged   int // blocks that were skipped
}

// copy copies in pieces, and a piece that holds a damaged block by blocks.
func (r *reader) copy(ctx context.Context, off, n int64) error {
	p := make([]byte, min(n, admin.MaxRead))
	for end := off + n; off < end; off += int64(len(p)) {
		p = p[:min(int64(len(p)), end-off)]
		err := r.c.Read(ctx, off, p)
		if isDamage(err) {
			err = r.blocks(ctx, off, p)
		} else if err == nil {
			_, err = r.out.Write(p)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (r *reader) blocks(ctx context.Context, off int64, p []byte) error {
	for len(p) > 0 {
		n := min(int64(len(p)), replicate.BlockSize-off%replicate.BlockSize)
		err := r.c.Read(ctx, off, p[:n])
		switch {
		case isDamage(err) && r.skip:
			r.damaged++
			clear(p[:n])
			fmt.Fprintf(r.errs, "nvmmirrord: zeros for bytes %d to %d: %v\n", off, off+n, err)
		case isDamage(err):
			return fmt.Errorf("%w; all before byte %d was written; to go on behind it: --skip-damaged", err, off)
		case err != nil:
			return err
		}
		if _, err := r.out.Write(p[:n]); err != nil {
			return err
		}
		off, p = off+n, p[n:]
	}
	return nil
}

func isDamage(err error) bool {
	var e *admin.Error
	return errors.As(err, &e) && e.Kind == admin.KindDamage
}
