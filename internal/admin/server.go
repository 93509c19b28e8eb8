package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// JournalFunc writes a live volume's journal to w as JSON lines. mode is ls,
// dump or verify. What it returns reaches the client behind the lines. It ends with
// ctx.
type JournalFunc func(ctx context.Context, w io.Writer, v *nvmmirror.Volume, mode string) error

// ServerOptions say what a server serves.
type ServerOptions struct {
	Volume  *nvmmirror.Volume
	Daemon  Daemon // MaxTransaction is the server's to fill in
	Journal JournalFunc
	// Degraded are reasons that the daemon knows of beside the volume's; may be
	// nil.
	Degraded func() []string
	Log      *zap.Logger
}

// Server serves the admin interface of one volume.
//
// Requests are of two sorts. One that writes data is ended by its client or
// by the volume being closed, which gives it time to be acknowledged. Every
// other is ended by Stop, before the volume is closed: it may look at memory
// that is then gone.
type Server struct {
	o    ServerOptions
	http *http.Server
	mux  *http.ServeMux
	tx   int64 // bytes that a transaction holds

	ctx    context.Context // ended by Stop
	cancel context.CancelFunc
	mu     sync.Mutex // of closed against active.Add
	closed bool
	active sync.WaitGroup // requests that Stop waits for
	inHand atomic.Int32   // how many
	writes chan struct{}  // bounds the memory of data that is being written
	reads  chan struct{}  // and read
	served chan error

	closeTime time.Duration // for what is left to be answered
}

const (
	writeBudget = 128 << 20 // bytes
	readSlots   = 8
	bodyTime    = 30 * time.Second       // for a body to arrive, and an answer to be taken
	stopTime    = 200 * time.Millisecond // for the end of an answer that Stop ends
)

// NewServer makes a server. Serve must follow.
func NewServer(o ServerOptions) *Server {
	s := &Server{o: o, mux: http.NewServeMux(), tx: maxTransaction(o.Volume), served: make(chan error, 1), closeTime: 5 * time.Second}
	s.o.Daemon.MaxTransaction = s.tx
	s.writes = make(chan struct{}, max(2, writeBudget/s.tx))
	s.reads = make(chan struct{}, readSlots)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.handle("GET /v1/status", s.status)
	s.handle("POST /v1/promote", s.promote)
	s.handle("POST /v1/continue-alone", s.continueAlone)
	s.handle("POST /v1/demote", s.demote)
	s.handle("GET /v1/wait", s.wait)
	s.handle("GET /v1/data", s.read)
	s.handle("GET /v1/journal", s.journal)
	exposition := s.metricsHandler()
	s.handle("GET /metrics", func(w http.ResponseWriter, r *http.Request) error {
		exposition.ServeHTTP(w, r)
		return nil
	})
	s.mux.HandleFunc("PUT /v1/data", s.authorized(s.write))
	s.mux.HandleFunc("/", s.authorized(func(w http.ResponseWriter, r *http.Request) {
		s.fail(w, r, newError(KindUsage, "there is no %s %s here", r.Method, r.URL.Path))
	}))
	errorLog, err := zap.NewStdLogAt(o.Log, zap.WarnLevel)
	if err != nil {
		panic(err) // the level exists
	}
	s.http = &http.Server{
		Handler: s.mux, ReadHeaderTimeout: bodyTime, IdleTimeout: time.Minute, MaxHeaderBytes: 16 << 10,
		ErrorLog: errorLog,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, userKey{}, allowed(c))
		},
	}
	return s
}

// Serve serves l until Stop and Close.
func (s *Server) Serve(l net.Listener) {
	go func() {
		err := s.http.Serve(l)
		if errors.Is(err, http.ErrServerClosed) {
			err = nil
		}
		s.served <- err
	}()
}

// Failed delivers why the server ended by itself.
func (s *Server) Failed() <-chan error { return s.served }

// Stop takes no more requests and ends all but those that write data. The
// volume can be closed when it returns.
func (s *Server) Stop() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	s.active.Wait()
}

// Close waits for what is left to be answered, and ends; it is an error where that
// takes too long. The socket is gone when it returns.
func (s *Server) Close() error {
	s.Stop()
	ctx, cancel := context.WithTimeout(context.Background(), s.closeTime)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if err != nil {
		err = errors.Join(err, s.http.Close())
	}
	return err
}

type userKey struct{}

// allowed says why the process at the other end may not use this daemon.
func allowed(c net.Conn) error {
	cred, err := peerCredentials(c)
	switch {
	case err != nil:
		return fmt.Errorf("peer credentials: %w", err)
	case cred.Uid != 0 && int(cred.Uid) != os.Geteuid():
		return fmt.Errorf("uid %d may not use a daemon of uid %d: run the command as that user, or as root", cred.Uid, os.Geteuid())
	}
	return nil
}

// authorized refuses other users, and everybody once the daemon stops.
func (s *Server) authorized(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		// That of an earlier answer on this connection ends with it.
		http.NewResponseController(w).SetWriteDeadline(time.Time{}) // it can
		if err, _ := r.Context().Value(userKey{}).(error); err != nil {
			s.o.Log.Warn("admin request refused", zap.String("path", r.URL.Path), zap.Error(err))
			s.fail(w, r, newError(KindDenied, "%v", err))
			return
		}
		if s.ctx.Err() != nil {
			s.fail(w, r, errStopping)
			return
		}
		h(w, r)
	}
}

var errStopping = newError(KindFailed, "the daemon is stopping")

// handle registers a handler that Stop waits for.
func (s *Server) handle(pattern string, h func(w http.ResponseWriter, r *http.Request) error) {
	s.mux.HandleFunc(pattern, s.authorized(func(w http.ResponseWriter, r *http.Request) {
		s.mu.Lock()
		if s.closed {
			s.mu.Unlock()
			s.fail(w, r, errStopping)
			return
		}
		s.active.Add(1)
		s.mu.Unlock()
		s.inHand.Add(1)
		defer s.active.Done()
		defer s.inHand.Add(-1)
		ctx, cancel := context.WithCancelCause(r.Context())
		defer cancel(nil)
		defer context.AfterFunc(s.ctx, func() {
			cancel(errStopping)
			http.NewResponseController(w).SetWriteDeadline(time.Now().Add(stopTime)) // it can
		})()
		if err := h(w, r.WithContext(ctx)); err != nil {
			if s.ctx.Err() != nil && errors.Is(err, context.Canceled) {
				err = errStopping
			}
			s.fail(w, r, err)
		}
	}))
}

// fail answers with an error.
func (s *Server) fail(w http.ResponseWriter, r *http.Request, err error) {
	e := classify(err)
	code, ok := httpStatus[e.Kind]
	if !ok {
		code = http.StatusInternalServerError
	}
	if code == http.StatusInternalServerError || e.Kind == KindRefused {
		level := zap.WarnLevel
		if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, unix.ECONNRESET) {
			level = zap.DebugLevel // the client went away before it had sent all
		}
		s.o.Log.Log(level, "admin request failed", zap.String("request", r.Method+" "+r.URL.Path), zap.String("kind", string(e.Kind)), zap.String("error", e.Message))
	}
	answer(w, code, e)
}

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(v) // the client may be gone: then nobody waits for it
}

func (s *Server) now() Status { return Status{s.volume(), s.o.Daemon} }

// volume is the volume's status with the daemon's reasons.
func (s *Server) volume() nvmmirror.Status {
	now := s.o.Volume.Status()
	if s.o.Degraded != nil {
		now.Degraded = append(now.Degraded, s.o.Degraded()...)
	}
	return now
}

func (s *Server) status(w http.ResponseWriter, _ *http.Request) error {
	answer(w, http.StatusOK, s.now())
	return nil
}

// change answers a change of role with the status after it.
func (s *Server) change(w http.ResponseWriter, r *http.Request, what string, f func() error) error {
	s.o.Log.Info("asked by an administrator", zap.String("change", what), zap.String("query", r.URL.RawQuery))
	before := s.o.Volume.Status().Peer
	if err := f(); err != nil {
		return err
	}
	if up(before) {
		patience := againTime
		if what != "demote" { // the peer may have died a moment ago
			patience /= 10
		}
		s.again(r.Context(), patience)
	}
	return s.status(w, r)
}

// up: there is a session with the peer.
func up(p replicate.Phase) bool {
	return p == replicate.PhaseConnected || p == replicate.PhaseCatchUp || p == replicate.PhaseResync || p == replicate.PhaseInSync
}

const againTime = 2 * time.Second

// again waits for the session that follows a change of role, which ends the one
// before: "lost" would say something else.
func (s *Server) again(ctx context.Context, patience time.Duration) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	t := time.NewTicker(waitEvery)
	defer t.Stop()
	for !up(s.o.Volume.Status().Peer) {
		select {
		case <-t.C:
		case <-ctx.Done():
			return
		}
	}
}

func (s *Server) promote(w http.ResponseWriter, r *http.Request) error {
	force, err := boolean(r, "force")
	if err != nil {
		return err
	}
	return s.change(w, r, "promote", func() error { return s.o.Volume.Promote(r.Context(), force) })
}

func (s *Server) continueAlone(w http.ResponseWriter, r *http.Request) error {
	force, err := boolean(r, "force")
	if err != nil {
		return err
	}
	return s.change(w, r, "continue alone", func() error { return s.o.Volume.ContinueAlone(r.Context(), force) })
}

func (s *Server) demote(w http.ResponseWriter, r *http.Request) error {
	return s.change(w, r, "demote", func() error { return s.o.Volume.Demote(r.Context()) })
}

const waitEvery = 10 * time.Millisecond

// wait answers when the peer is in the state that is asked for.
func (s *Server) wait(w http.ResponseWriter, r *http.Request) error {
	what := r.URL.Query().Get("for")
	if what != "in-sync" && what != "connected" {
		return newError(KindUsage, "wait for %q: only in-sync and connected can be waited for", what)
	}
	limit, err := duration(r, "timeout")
	if err != nil {
		return err
	}
	ctx, cancel := withTimeout(r.Context(), limit)
	defer cancel()
	t := time.NewTicker(waitEvery)
	defer t.Stop()
	for {
		now := s.now()
		switch now.Peer {
		case replicate.PhaseInSync:
			return s.status(w, r)
		case replicate.PhaseConnected, replicate.PhaseCatchUp, replicate.PhaseResync:
			if what == "connected" {
				return s.status(w, r)
			}
		case replicate.PhaseNone:
			return newError(KindFailed, "this node is standalone: there is no peer to wait for")
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			if r.Context().Err() != nil {
				return r.Context().Err()
			}
			return newError(KindTimeout, "not %s within %v: the peer is %s (%s)", what, limit, now.Peer, now.Reason)
		}
	}
}

func withTimeout(ctx context.Context, d time.Duration) (context.Context, context.CancelFunc) {
	if d <= 0 {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, d)
}

func boolean(r *http.Request, key string) (bool, error) {
	s := r.URL.Query().Get(key)
	if s == "" {
		return false, nil
	}
	b, err := strconv.ParseBool(s)
	if err != nil {
		return false, newError(KindUsage, "%s is %q, not true or false", key, s)
	}
	return b, nil
}

func duration(r *http.Request, key string) (time.Duration, error) {
	s := r.URL.Query().Get(key)
	if s == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil || d < 0 {
		return 0, newError(KindUsage, `%s is %q, not a duration such as "10s"`, key, s)
	}
	return d, nil
}

func number(r *http.Request, key string) (int64, error) {
	s := r.URL.Query().Get(key)
	n, err := strconv.ParseInt(s, 10, 64)
	if err != nil || n < 0 {
		return 0, newError(KindUsage, "%s is %q, not a number of bytes", key, s)
	}
	return n, nil
}
