package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/nvmmirror/nvmmirror/internal/admin"
	"github.com/nvmmirror/nvmmirror/internal/config"
)

// withClient makes a command one that talks to a daemon.
func withClient(cmd *cobra.Command, run func(cmd *cobra.Command, c *admin.Client) error) *cobra.Command {
	return clientCommand(cmd, admin.FindSocket, run)
}

// toChange is withClient of a command that changes something.
func toChange(cmd *cobra.Command, run func(cmd *cobra.Command, c *admin.Client) error) *cobra.Command {
	return clientCommand(cmd, admin.OnlySocket, run)
}

func clientCommand(cmd *cobra.Command, find func(dir string) (string, error), run func(cmd *cobra.Command, c *admin.Client) error) *cobra.Command {
	socket := socketFlag(cmd)
	cmd.Args = cobra.NoArgs
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		c, err := dial(*socket, find)
		if err != nil {
			return err
		}
		defer c.Close()
		return run(cmd, c)
	}
	return cmd
}

func socketFlag(cmd *cobra.Command) *string {
	var path socketPath
	cmd.Flags().Var(&path, "socket", "the daemon's admin socket (default: the only one in "+config.SocketDir+")")
	return (*string)(&path)
}

// socketPath is a path. An empty one is a script's variable that is not set: the
// command would go to whichever daemon there is.
type socketPath string

// Set implements pflag.Value.
func (p *socketPath) Set(s string) error {
	if s == "" {
		return errors.New("it is empty")
	}
	*p = socketPath(s)
	return nil
}

// String implements pflag.Value.
func (p *socketPath) String() string { return string(*p) }

// Type implements pflag.Value.
func (p *socketPath) Type() string { return "path" }

// dial makes a client of the daemon at socket, "" for the one to find.
func dial(socket string, find func(dir string) (string, error)) (*admin.Client, error) {
	if socket == "" {
		var err error
		if socket, err = find(config.SocketDir); err != nil {
			return nil, err
		}
	}
	return admin.NewClient(socket), nil
}
