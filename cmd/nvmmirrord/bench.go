package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror/internal/bench"
)

func newBenchCommand() *cobra.Command {
	cmd := newGroup("bench", "Measure the mirror, and the wire under it, on machines of your own")
	cmd.AddCommand(newBenchCommitCommand(), newBenchWireCommand(), newBenchReportCommand(), newBenchChildCommand())
	return cmd
}

// newBenchChildCommand is the other end of a measurement on one machine.
func newBenchChildCommand() *cobra.Command {
	return &cobra.Command{
		Use: "child", Short: "The other end of a measurement, on standard input and output", Hidden: true, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return bench.ServeChild(cmd.InOrStdin(), cmd.OutOrStdout())
		},
	}
}

// benchProgram is the command line of that other end.
func benchProgram() ([]string, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("this program's own file: %w", err)
	}
	return []string{self, "bench", "child"}, nil
}

const placements = "apart (each its half), together (both on one) or free (the scheduler's choice)"

// benchContext ends where the terminal is closed, too: regions that are left
// behind are memory.
func benchContext(cmd *cobra.Command) (context.Context, context.CancelFunc) {
	if signal.Ignored(unix.SIGHUP) { // nohup
		return context.WithCancel(cmd.Context())
	}
	return signal.NotifyContext(cmd.Context(), unix.SIGHUP)
}

// benchError is the command's error. An option that was refused is one of usage; what
// fails once ctx has ended follows from that.
func benchError(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return errors.New("interrupted")
	}
	var option *bench.OptionError
	if errors.As(err, &option) {
		return usageErrorf("--%v", err)
	}
	return err
}
