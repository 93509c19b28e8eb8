package admin

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// written is the answer to data that was written.
type written struct {
	LSN nvmmirror.LSN `json:"lsn"`
}

// write makes the body one transaction. The client's going ends its wait, not
// the transaction: then nobody learns its outcome.
func (s *Server) write(w http.ResponseWriter, r *http.Request) {
	lsn, err := s.commit(w, r)
	if err != nil {
		s.fail(w, r, err)
		return
	}
	answer(w, http.StatusOK, written{lsn})
}

func (s *Server) commit(w http.ResponseWriter, r *http.Request) (nvmmirror.LSN, error) {
	off, err := number(r, "offset")
	if err != nil {
		return 0, err
	}
	limit, err := duration(r, "timeout")
	if err != nil {
		return 0, err
	}
	ctx, cancel := withTimeout(r.Context(), limit)
	defer cancel()
	if r.ContentLength < 0 {
		return 0, newError(KindUsage, "the length of the data must be known (Content-Length): it is one transaction")
	}
	if r.ContentLength > s.tx {
		return 0, newError(KindRange, "%d bytes are more than a transaction of this volume holds (%d): write smaller chunks, or use a larger journal", r.ContentLength, s.tx)
	}
	if err := acquire(ctx, s.writes); err != nil {
		return 0, notWritten(err)
	}
	defer func() { <-s.writes }()
	p := make([]byte, r.ContentLength)
	if err := readBody(w, r, p); err != nil {
		return 0, notWritten(err)
	}
	tx := s.o.Volume.Begin()
	if err := tx.Write(off, p); err != nil {
		tx.Discard()
		return 0, err
	}
	lsn, err := tx.Commit(ctx)
	if errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, nvmmirror.ErrOutcomeUnknown) {
		err = newError(KindTimeout, "not written within %v: this node is not ready to take transactions, or its journal is full", limit)
	}
	return lsn, err
}

func notWritten(err error) error { return fmt.Errorf("nothing of it was written: %w", err) }

// readBody fills p. The deadline is the body's only: while the transaction
// waits, a read that ends means that the client is gone.
func readBody(w http.ResponseWriter, r *http.Request, p []byte) error {
	c := http.NewResponseController(w)
	if err := c.SetReadDeadline(time.Now().Add(bodyTime)); err != nil {
		return err
	}
	if _, err := io.ReadFull(r.Body, p); err != nil {
		return err
	}
	// The end of the body starts the server's watch over the connection.
	if _, err := io.Copy(io.Discard, r.Body); err != nil {
		return err
	}
	return c.SetReadDeadline(time.Time{})
}

func acquire(ctx context.Context, slots chan struct{}) error {
	select {
	case slots <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// read answers with bytes of one moment.
func (s *Server) read(w http.ResponseWriter, r *http.Request) error {
	off, err := number(r, "offset")
	if err != nil {
		return err
	}
	n, err := number(r, "length")
	if err != nil {
		return err
	}
	if n > MaxRead {
		return newError(KindUsage, "length is %d, more than the %d bytes that one request reads: read piece by piece", n, MaxRead)
	}
	if size := s.o.Volume.Size(); off > size || n > size-off {
		return fmt.Errorf("%w: %d bytes at offset %d of %d", nvmmirror.ErrOutOfRange, n, off, size)
	}
	if err := acquire(r.Context(), s.reads); err != nil {
		return err
	}
	defer func() { <-s.reads }()
	p := make([]byte, n)
	_, err = s.o.Volume.ReadAt(p, off)
	var fault *pmem.FaultError
	if errors.As(err, &fault) {
		// A page that cannot be read is damage like any other, unless it ended
		// the node: then the same error comes of every block.
		if now := s.o.Volume.Status(); now.Failed == "" {
			return newError(KindDamage, "%v", err)
		}
	}
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Content-Length", strconv.FormatInt(n, 10))
	answer := &stream{w, http.NewResponseController(w), r.Context()}
	answer.Write(p) // the client sees by the length that it is not all
	return nil
}

// errorTrailer carries an Error behind JSON lines.
const errorTrailer = "Nvmmirror-Error"

// journal streams the live journal.
func (s *Server) journal(w http.ResponseWriter, r *http.Request) error {
	mode := r.URL.Query().Get("mode")
	switch {
	case mode != "ls" && mode != "dump" && mode != "verify":
		return newError(KindUsage, "mode is %q, not ls, dump or verify", mode)
	case s.o.Journal == nil:
		return newError(KindFailed, "this daemon cannot show a live journal; stop it, or inspect a copy of the region")
	}
	if err := acquire(r.Context(), s.reads); err != nil {
		return err
	}
	defer func() { <-s.reads }()
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Trailer", errorTrailer)
	ctx := r.Context()
	err := s.o.Journal(ctx, &stream{w, http.NewResponseController(w), ctx}, s.o.Volume, mode)
	if err == nil {
		return nil
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = context.Cause(ctx) // the daemon is stopping
	}
	b, _ := json.Marshal(classify(err)) // two strings always marshal
	w.Header().Set(errorTrailer, string(b))
	return nil
}

// stream is a response that ends with its context, and with a client that
// takes nothing.
type stream struct {
	w   io.Writer
	c   *http.ResponseController
	ctx context.Context
}

func (s *stream) Write(p []byte) (int, error) {
	if err := s.c.SetWriteDeadline(time.Now().Add(bodyTime)); err != nil {
		return 0, err
	}
	// In this order: the deadline that Stop sets is not put off.
	if s.ctx.Err() != nil {
		return 0, context.Cause(s.ctx)
	}
	return s.w.Write(p)
}
