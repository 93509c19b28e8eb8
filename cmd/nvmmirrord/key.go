package main

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

func newKeyCommand() *cobra.Command {
	group := newGroup("key", "Keys of the connection between the nodes")
	var tls bool
	generate := &cobra.Command{
		Use:   "generate FILE | generate --tls PREFIX",
		Short: "Write a new random key, readable by its owner only; nothing is overwritten",
		Long: `Without --tls: write a key for transport = "md5sig" to FILE, which both nodes
hold. Copy it to the other node over a channel that you trust.

With --tls: write this node's key pair for transport = "tls" to PREFIX.key and
PREFIX.pub, on each node its own. The private key stays where it is (tls_key);
PREFIX.pub goes to the other node (tls_peer there). It is no secret, but whoever
can exchange it on the way can take this node's place: compare the line that is
printed here with the one in the other node's log.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if args[0] == "" {
				return usageErrorf("the path is empty")
			}
			if tls {
				if _, name := filepath.Split(strings.TrimSuffix(args[0], ".key")); name == "" || name == "." || name == ".." {
					return usageErrorf("PREFIX is %s, which holds no name: give one such as node-a", args[0])
				}
				key, pub, pin, err := transport.GenerateTLSKey(args[0])
				if err != nil {
					return err
				}
				fmt.Fprintf(cmd.OutOrStdout(), "wrote %s, which stays on this node (tls_key),\nand %s, to be copied to the other node (tls_peer there)\n%v\n", key, pub, pin)
				return nil
			}
			if err := transport.GenerateKey(args[0]); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "wrote %s; copy it to the other node, mode 0600\n", args[0])
			return nil
		},
	}
	generate.Flags().BoolVar(&tls, "tls", false, "a key pair of this node for transport = \"tls\", instead of a key of both for \"md5sig\"")
	group.AddCommand(generate)
	return group
}
