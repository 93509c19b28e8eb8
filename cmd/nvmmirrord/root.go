package main

import (
	"strings"

	"github.com/spf13/cobra"
)

// commands makes the subcommands. Each has a file of its own.
var commands = []func() *cobra.Command{
	newCreateCommand,
	newInfoCommand,
	newCheckCommand,
	newServeCommand,
	newStatusCommand,
	newPromoteCommand,
	newContinueAloneCommand,
	newDemoteCommand,
	newWaitCommand,
	newWriteCommand,
	newReadCommand,
	newJournalCommand,
	newKeyCommand,
	newDemoCommand,
	newBenchCommand,
}

// newRootCommand is the whole command tree. started becomes true when a
// command's own code begins: an error before that is one of usage.
func newRootCommand(started *bool) *cobra.Command {
	root := newGroup("nvmmirrord", "Mirror persistent memory to a second machine, commit by commit")
	root.Long = root.Short + `.

Exit codes: 0 done, 1 failed, 2 usage or configuration (also a file that is no
region, or needs a newer program), 3 damage found, 4 refused because it could lose
data.`
	root.SilenceUsage = true
	root.SilenceErrors = true
	root.Version = versionText()
	root.SetVersionTemplate("{{.Version}}\n")
	root.CompletionOptions.HiddenDefaultCmd = true
	for _, make := range commands {
		root.AddCommand(make())
	}
	root.SetHelpCommand(newHelpCommand())
	root.InitDefaultHelpCmd()
	note(root, started)
	return root
}

// newHelpCommand is cobra's, but that a command that is not there is an error.
func newHelpCommand() *cobra.Command {
	return &cobra.Command{
		Use: "help [COMMAND]", Short: "Help about a command",
		RunE: func(cmd *cobra.Command, args []string) error {
			sub, rest, err := cmd.Root().Find(args)
			if err != nil || len(rest) > 0 {
				return usageErrorf("unknown command %q", strings.Join(args, " "))
			}
			sub.InitDefaultHelpFlag() // so that they are listed
			sub.InitDefaultVersionFlag()
			return sub.Help()
		},
	}
}

// newGroup is a command that only has subcommands.
func newGroup(use, short string) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cmd.SetOut(cmd.ErrOrStderr())
			if err := cmd.Help(); err != nil {
				return err
			}
			return usageErrorf("name a command")
		},
	}
}

// note makes each command say that its code begins.
func note(cmd *cobra.Command, started *bool) {
	if run := cmd.RunE; run != nil {
		cmd.RunE = func(cmd *cobra.Command, args []string) error {
			*started = true
			return run(cmd, args)
		}
	}
	for _, sub := range cmd.Commands() {
		note(sub, started)
	}
}
