package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/internal/admin"
	"github.com/nvmmirror/nvmmirror/internal/config"
	"github.com/nvmmirror/nvmmirror/replicate"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

func newServeCommand() *cobra.Command {
	var file string
	var acceptLoss bool
	level := zapcore.InfoLevel
	cmd := &cobra.Command{
		Use:   "serve --config FILE",
		Short: "Run a node until SIGTERM",
		Long: `Run a node in the role that its region remembers, until SIGTERM or SIGINT, then
stop cleanly. No file sets the role: a new region is a secondary that waits to be
promoted, or for a primary. A new region that is served without [peer] is the
primary at once; one that was a pair's keeps its role.

The file is read once: SIGHUP changes nothing, and the log says so.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return serve(cmd.Context(), file, level, acceptLoss) },
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration file, TOML (required)")
	cmd.Flags().Var(&levelFlag{&level}, "log-level", "debug, info, warn or error")
	cmd.Flags().BoolVar(&acceptLoss, "accept-loss", false, "open a region without [peer] also where its journal is damaged: what lies behind the damage is lost")
	cmd.MarkFlagRequired("config") // the flag exists
	return cmd
}

type levelFlag struct{ *zapcore.Level }

func (levelFlag) Type() string { return "level" }

func newLogger(level zapcore.Level) (*zap.Logger, error) {
	c := zap.NewProductionConfig()
	c.Level = zap.NewAtomicLevelAt(level)
	c.Sampling = nil // what is logged here is rare, and each line counts
	c.DisableStacktrace = true
	c.DisableCaller = true
	c.EncoderConfig.EncodeTime = zapcore.RFC3339NanoTimeEncoder
	c.EncoderConfig.EncodeDuration = zapcore.StringDurationEncoder
	return c.Build()
}

const readyTime = 5 * time.Second // for the daemon to answer itself

// serve runs a node until ctx ends.
func serve(ctx context.Context, file string, level zapcore.Level, acceptLoss bool) (err error) {
	// A Go program that panics ends with 2, which says that the configuration is
	// wrong: a service manager would leave the node down. So it ends by SIGABRT.
	debug.SetTraceback("crash")
	// A terminal that is closed, or a reader of the log that is gone, must not take
	// a node down that its peer may depend on.
	signal.Ignore(unix.SIGPIPE)
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, unix.SIGHUP)
	// A page that the kernel finds bad is to be an error of whoever reads it. With
	// vm.memory_failure_early_kill it would be a signal that ends the process.
	syscall.AllThreadsSyscall(unix.SYS_PRCTL, unix.PR_MCE_KILL, unix.PR_MCE_KILL_SET, unix.PR_MCE_KILL_LATE)
	cfg, err := config.Load(file)
	if err != nil {
		return err
	}
	if acceptLoss && cfg.Peer != nil {
		return usageErrorf("--accept-loss is for a region without [peer]: a peer repairs the journal, or continue-alone --force gives up what it lost")
	}
	var peer transport.Transport
	if cfg.Peer != nil {
		if peer, err = cfg.Peer.NewTransport(file); err != nil {
			return err
		}
	}
	switch info, err := os.Stat(cfg.Region); {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("region: %w; is its file system mounted? A new region is made with: nvmmirrord create %s --size SIZE", err, cfg.Region)
	case err == nil && info.IsDir():
		return &config.Error{File: file, Key: "region", Problem: "is " + cfg.Region + ", a directory: name the file in it that nvmmirrord create made"}
	}
	log, err := newLogger(level)
	if err != nil {
		return err
	}
	defer log.Sync()
	started := time.Now()

	// The socket comes first: a daemon that is in the way is found before the
	// region is touched.
	l, err := admin.Listen(cfg.Socket, log)
	if err != nil {
		return err
	}
	defer l.Close()
	socket := watchSocket(cfg.Socket)
	opt := cfg.Options(peer)
	opt.Logger, opt.AcceptLoss = log, acceptLoss
	v, err := nvmmirror.Open(cfg.Region, opt)
	if err != nil {
		return err
	}
	region := watchRegionFile(cfg.Region)
	degraded := func() []string { return append(region.degraded(), socket.degraded()...) }
	d := admin.Daemon{PID: os.Getpid(), Version: versionText(), Started: started, Config: file, Socket: cfg.Socket}
	if p := cfg.Peer; p != nil {
		heartbeat, lease := replicate.Timing(p.Timeout)
		d.Listen, d.Address = p.Listen.String(), p.Address.String()
		d.Timeout, d.Heartbeat, d.ReadLease = p.Timeout.String(), heartbeat.String(), lease.String()
	}
	announce(log, v, &d)
	if t, ok := peer.(*transport.TLS); ok {
		own, other := t.Pins()
		log.Info("TLS keys", zap.Stringer("own", own), zap.Stringer("peer", other))
	}
	s := admin.NewServer(admin.ServerOptions{Volume: v, Daemon: d, Journal: writeLiveJournal, Degraded: degraded, Log: log})
	s.Serve(l)
	w := startWatch(v, degraded, log)
	err = untilStopped(ctx, s, hup, cfg.Socket, log)

	notify(log, daemon.SdNotifyStopping)
	log.Info("stopping")
	w.stop()
	s.Stop()
	closed := v.Close()
	if e := s.Close(); e != nil {
		log.Warn("the admin server did not end in time", zap.Error(e))
	}
	if closed != nil {
		log.Error("not closed cleanly", zap.String("region", cfg.Region), zap.Error(closed))
		return errors.Join(err, fmt.Errorf("%s: not closed cleanly: %w", cfg.Region, closed))
	}
	log.Info("stopped", zap.String("region", cfg.Region))
	return err
}

// announce logs what the node is and what follows from its configuration.
func announce(log *zap.Logger, v *nvmmirror.Volume, d *admin.Daemon) {
	s := v.Status()
	fields := []zap.Field{
		zap.String("region", s.Path), zap.String("class", s.Class), zap.Int64("size", s.Size), zap.Int64("journal_size", s.Journal),
		zap.String("role", s.Role), zap.Bool("title", s.Title), zap.Stringer("epoch", s.Epoch), zap.Stringer("lineage", s.Lineage),
		zap.Any("recovery", s.Recovery), zap.String("version", d.Version), zap.String("socket", d.Socket),
	}
	if d.Timeout != "" {
		fields = append(fields, zap.String("listen", d.Listen), zap.String("peer", d.Address), zap.String("transport", s.Transport),
			zap.String("timeout", d.Timeout), zap.String("heartbeat", d.Heartbeat), zap.String("read_lease", d.ReadLease))
	}
	log.Info("region open", fields...)
}

// untilStopped says that the daemon is ready once it has answered, and waits
// until it is to end.
func untilStopped(ctx context.Context, s *admin.Server, hup <-chan os.Signal, socket string, log *zap.Logger) error {
	probe, cancel := context.WithTimeout(ctx, readyTime)
	defer cancel()
	c := admin.NewClient(socket)
	_, err := c.Status(probe)
	c.Close()
	switch {
	case ctx.Err() != nil:
		return nil
	case err != nil:
		return fmt.Errorf("the admin socket does not answer: %w", err)
	}
	notify(log, daemon.SdNotifyReady)
	log.Info("ready", zap.String("socket", socket))
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-s.Failed():
			return fmt.Errorf("the admin server ended: %w", err)
		case <-hup:
			log.Warn("SIGHUP is ignored: the configuration is read at the start; SIGTERM ends the daemon")
		}
	}
}

// notify tells the service manager, if there is one.
func notify(log *zap.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("the service manager is not told", zap.String("state", state), zap.Error(err))
	}
}
