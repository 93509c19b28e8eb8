package chaos

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/internal/admin"
	"github.com/nvmmirror/nvmmirror/internal/config"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// childPlain is the role of a daemon without signatures, which no configuration
// of the real one allows.
const childPlain = "plain"

func runChild(role string, args []string) int {
	err := fmt.Errorf("unknown role %q", role)
	if role == childPlain && len(args) == 3 { // serve --config FILE
		err = servePlain(args[2])
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// servePlain runs a node over plain TCP until SIGTERM.
func servePlain(file string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	c, err := config.Load(file)
	if err != nil {
		return err
	}
	log, err := zap.NewProduction(zap.WithCaller(false), zap.AddStacktrace(zap.FatalLevel))
	if err != nil {
		return err
	}
	o := c.Options(nil)
	o.Logger = log
	o.Peer.Transport, err = transport.NewPlain(c.Peer.Address.Addr(), transport.Options{UserTimeout: c.Peer.Timeout})
	if err != nil {
		return err
	}
	v, err := nvmmirror.Open(c.Region, o)
	if err != nil {
		return err
	}
	l, err := admin.Listen(c.Socket, log)
	if err != nil {
		return errors.Join(err, v.Close())
	}
	s := admin.NewServer(admin.ServerOptions{Volume: v, Daemon: admin.Daemon{PID: os.Getpid(), Started: time.Now(), Socket: c.Socket}, Log: log})
	s.Serve(l)
	<-ctx.Done()
	s.Stop()
	return errors.Join(v.Close(), s.Close())
}
