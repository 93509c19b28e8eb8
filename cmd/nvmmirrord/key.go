package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

func newKeyCommand() *cobra.Command {
	group := newGroup("key", "Keys of the connection between the nodes")
	group.AddCommand(&cobra.Command{
		Use:   "generate FILE",
		Short: "Write a new random key, readable by its owner only; nothing is overwritten",
		Args:  cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := transport.GenerateKey(args[0]); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "wrote %s; copy it to the other node, mode 0600\n", args[0])
			return nil
		},
	})
	return group
}
