// Nvmmirrord is the daemon of a mirrored pair, and its administration.
package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// The first signal asks, the second one ends.
	context.AfterFunc(ctx, stop)
	os.Exit(run(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// run runs a command line and returns its exit code.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	var started bool
	root := newRootCommand(&started)
	root.SetArgs(args)
	root.SetIn(stdin)
	out := &printed{w: stdout}
	root.SetOut(out)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil && out.err != nil {
		err = fmt.Errorf("done, but what it printed is lost: %w", out.err)
	}
	if err == nil {
		return exitDone
	}
	fmt.Fprintln(stderr, "nvmmirrord:", err)
	code := exitCode(err)
	if !started && out.err == nil {
		// Nothing but the command line has been looked at.
		code = exitUsage
	}
	if code == exitUsage && cmd != nil {
		fmt.Fprintf(stderr, "See: %s --help\n", cmd.CommandPath())
	}
	return code
}

// printed is standard output. It keeps its first error: not every command looks at
// what becomes of its last line.
type printed struct {
	w   io.Writer
	err error
}

// Write implements io.Writer.
func (p *printed) Write(b []byte) (int, error) {
	n, err := p.w.Write(b)
	if p.err == nil {
		p.err = err
	}
	return n, err
}
