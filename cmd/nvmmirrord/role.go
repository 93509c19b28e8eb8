package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/nvmmirror/nvmmirror/internal/admin"
)

// say prints what a change of role, or a wait, has led to.
func say(cmd *cobra.Command, s admin.Status) {
	fmt.Fprintf(cmd.OutOrStdout(), "%s: %s%s, epoch %v, LSN %v, peer %s\n", s.Path, s.Role, waits(s), s.Epoch, s.Committed, s.Peer)
}

// waits says that a primary does not serve, or that its commits wait.
func waits(s admin.Status) string {
	switch {
	case s.Failed != "":
		return ", persistence failed"
	case s.Role == "primary" && !s.Serving:
		return ", not serving yet"
	case s.Waiting:
		return ", commits wait"
	}
	return ""
}

// failed is the error of a command that wants a node to serve whose persistence has
// failed.
func failed(s admin.Status) error {
	return &exitError{exitRefused, fmt.Errorf("persistence has failed here, and nothing is acknowledged until the daemon was restarted: %s", s.Failed)}
}

// failedInstead is failed where persistence has failed, whatever the command met on
// its way; else err.
func failedInstead(cmd *cobra.Command, c *admin.Client, err error) error {
	if s, e := c.Status(cmd.Context()); e == nil && s.Failed != "" {
		return failed(s)
	}
	return err
}

func newPromoteCommand() *cobra.Command {
	var force bool
	cmd := toChange(&cobra.Command{
		Use:   "promote",
		Short: "Make this node the primary; refused (exit 4) where that could lose data",
		Long: `Make this node the primary. It needs the title, or on a blank node an equally
blank peer, for which it waits up to 10 seconds; else it is refused, exit 4.

--force overrides that. Make sure first that the other node is down for good:
what it acknowledged and this node does not hold is lost, and if it goes on, the
two split.`,
	}, func(cmd *cobra.Command, c *admin.Client) error {
		before, err := c.Status(cmd.Context())
		if err != nil {
			return err
		}
		s, err := c.Promote(cmd.Context(), force)
		if err != nil {
			return failedInstead(cmd, c, err)
		}
		say(cmd, s)
		switch {
		case s.Failed != "":
			return failed(s)
		case before.Role == "primary" && (s.Waiting || !s.Serving):
			return &exitError{exitRefused, errors.New("it was the primary before, and waits for its peer: connect that, or go on without it by continue-alone (--force where the peer may have been promoted), or demote it")}
		}
		return nil
	})
	cmd.Flags().BoolVar(&force, "force", false, "even where that could lose data")
	return cmd
}

func newContinueAloneCommand() *cobra.Command {
	var force bool
	cmd := toChange(&cobra.Command{
		Use:   "continue-alone",
		Short: "Make a primary go on without its lost peer; refused (exit 4) without the title",
		Long: `Make a primary that waits for its lost peer go on without it. Without the title
it is refused, exit 4: the peer may have been promoted.

--force overrides that. Make sure first that the peer is down for good.`,
	}, func(cmd *cobra.Command, c *admin.Client) error {
		s, err := c.ContinueAlone(cmd.Context(), force)
		if err != nil {
			return failedInstead(cmd, c, err)
		}
		say(cmd, s)
		if s.Failed != "" {
			return failed(s)
		}
		return nil
	})
	cmd.Flags().BoolVar(&force, "force", false, "even where that could lose data")
	return cmd
}

func newDemoteCommand() *cobra.Command {
	return toChange(&cobra.Command{
		Use:   "demote",
		Short: "Make the primary a secondary, once all that it took is acknowledged",
	}, func(cmd *cobra.Command, c *admin.Client) error {
		s, err := c.Demote(cmd.Context())
		if err != nil {
			return err
		}
		say(cmd, s)
		return nil
	})
}

func newWaitCommand() *cobra.Command {
	var what string
	var timeout time.Duration
	cmd := withClient(&cobra.Command{
		Use:   "wait --for in-sync|connected",
		Short: "Wait until the peer is in sync, or connected",
	}, func(cmd *cobra.Command, c *admin.Client) error {
		s, err := c.Wait(cmd.Context(), what, timeout)
		if err != nil {
			return err
		}
		say(cmd, s)
		return nil
	})
	cmd.Flags().StringVar(&what, "for", "", "in-sync or connected (required)")
	cmd.Flags().DurationVar(&timeout, "timeout", 0, "give up after this time, exit 1 (0: never)")
	cmd.MarkFlagRequired("for") // the flag exists
	talk := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		// What is wrong in itself is so whether there is a daemon or not.
		if what != "in-sync" && what != "connected" {
			return usageErrorf("--for is %q, not in-sync or connected", what)
		}
		if timeout < 0 {
			return usageErrorf("--timeout is %v: give a time to wait, or 0 to wait for ever", timeout)
		}
		return talk(cmd, args)
	}
	return cmd
}
