package main

import (
	"fmt"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror/internal/demo"
)

func newDemoCommand() *cobra.Command {
	var o demo.Options
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show a pair at work on this machine: kill its primary, lose nothing",
		Long: `Run two daemons on this machine, mirror transactions between them over
TCP_MD5SIG, kill the primary in the middle with SIGKILL, promote the survivor,
and prove that it holds everything that was acknowledged. Then the dead node
comes back, and both regions are compared.

It needs no privilege and takes a few seconds. As root it also shows what
TCP_MD5SIG is for: the same transfer over a wire that damages packets, with and
without it. Nothing is left behind, unless --keep is given. Exit 1: a check
failed.`,
		Args: cobra.NoArgs,
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) (err error) {
		if o.Program, err = os.Executable(); err != nil {
			return fmt.Errorf("this program's own file: %w", err)
		}
		o.Out, o.Err = cmd.OutOrStdout(), cmd.ErrOrStderr()
		// A terminal that is closed, and a pipe that nobody reads, end it in
		// order too; the latter by the error of the write.
		ctx, stop := signal.NotifyContext(cmd.Context(), unix.SIGHUP)
		defer stop()
		signal.Notify(make(chan os.Signal, 1), unix.SIGPIPE)
		return demo.Run(ctx, o)
	}
	f := cmd.Flags()
	f.BoolVar(&o.Keep, "keep", false, "leave the pair running, and say how to look at it")
	f.Uint64Var(&o.Seed, "seed", 0, "of contents and of when the primary is killed (0: draw one)")
	f.StringVar(&o.Sabotage, "sabotage", "", "for tests: spoil a byte of the survivor, by \""+demo.SabotageMemory+"\" or \""+demo.SabotageWrite+"\"")
	f.MarkHidden("sabotage") // the flag exists
	return cmd
}
