package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/pmem"
)

func newCreateCommand() *cobra.Command {
	var volume size
	ring := size(nvmmirror.DefaultJournal)
	var emulate, paged bool
	cmd := &cobra.Command{
		Use:   "create PATH --size SIZE",
		Short: "Create a blank region; nothing is ever overwritten",
		Long: `Create a blank region at PATH: a file on a filesystem mounted with -o dax, or a
devdax device. It belongs to no lineage yet: with a peer it is a secondary until it
is promoted, and two blank nodes are in sync without a copy. Nothing is ever
overwritten.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			accept := pmem.Cacheline
			switch {
			case emulate:
				accept = pmem.Emulated
			case paged:
				accept = pmem.Paged
			}
			path := args[0]
			if path == "" {
				return usageErrorf("PATH is empty")
			}
			if ring == 0 {
				return usageErrorf("--journal-size is 0")
			}
			if err := nvmmirror.Create(path, nvmmirror.CreateOptions{Size: int64(volume), JournalSize: int64(ring), Accept: accept}); err != nil {
				if weak := (*pmem.ClassError)(nil); errors.As(err, &weak) {
					return fmt.Errorf("%w (create accepts it with %s)", err, map[pmem.Class]string{pmem.Emulated: "--emulate", pmem.Paged: "--allow-paged"}[weak.Have])
				}
				return err
			}
			view, err := pmem.OpenReadOnly(path)
			if err != nil {
				return err
			}
			defer view.Close()
			fmt.Fprintf(cmd.OutOrStdout(), "created %s: volume %v, journal %v, class %v\n", path, &volume, &ring, view.Class())
			if view.Class() == pmem.Emulated {
				fmt.Fprintln(cmd.ErrOrStderr(), "nvmmirrord: warning: emulated memory: nothing in this region survives a reboot")
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.Var(&volume, "size", "size of the volume, a multiple of 4KiB (required)")
	f.Var(&ring, "journal-size", "size of the journal, a multiple of 2MiB")
	f.BoolVar(&emulate, "emulate", false, "accept volatile memory (tmpfs, a devdax device of RAM), for tests")
	f.BoolVar(&paged, "allow-paged", false, "accept an ordinary file: every commit is then an msync")
	cmd.MarkFlagRequired("size") // the flag exists
	return cmd
}
