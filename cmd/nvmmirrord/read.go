package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/nvmmirror/nvmmirror/internal/admin"
)

func newReadCommand() *cobra.Command {
	var offset, length size
	cmd := withClient(&cobra.Command{
		Use:   "read --offset N --length L",
		Short: "Read bytes of a primary's volume to standard output",
		Long: fmt.Sprintf(`Read bytes of a primary's volume to standard output, verified by their
checksums. Each piece of %d MiB is of one moment.`, admin.MaxRead>>20),
	}, func(cmd *cobra.Command, c *admin.Client) error {
		s, err := c.Status(cmd.Context())
		if err != nil {
			return err
		}
		if int64(offset) > s.Size || int64(length) > s.Size-int64(offset) {
			return fmt.Errorf("%d bytes at offset %d are beyond the end of the volume, which has %d", length, offset, s.Size)
		}
		p := make([]byte, min(int64(length), admin.MaxRead))
		for off, end := int64(offset), int64(offset+length); off < end; off += int64(len(p)) {
			p = p[:min(int64(len(p)), end-off)]
			if err := c.Read(cmd.Context(), off, p); err != nil {
				return err
			}
			if _, err := cmd.OutOrStdout().Write(p); err != nil {
				return err
			}
		}
		return nil
	})
	cmd.Flags().Var(&offset, "offset", "where to start, such as 4096 or 1MiB (required)")
	cmd.Flags().Var(&length, "length", "how many bytes (required)")
	cmd.MarkFlagRequired("offset") // the flags exist
	cmd.MarkFlagRequired("length")
	return cmd
}
