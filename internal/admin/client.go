package admin

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror"
)

// Client talks to the daemon behind a socket. Its errors are [*Error], but that of a
// writer to [Client.Journal].
type Client struct {
	socket     string
	http       http.Client
	statusTime time.Duration
}

// NewClient makes a client. Close must follow.
func NewClient(socket string) *Client {
	c := &Client{socket: socket, statusTime: 10 * time.Second}
	c.http.Transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			conn, err := d.DialContext(ctx, "unix", socket)
			if err != nil {
				return nil, unreachable(socket, err)
			}
			return conn, nil
		},
		DisableCompression: true,
	}
	return c
}

// Close closes idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func unreachable(socket string, err error) error {
	m := "no daemon answers at " + socket
	switch {
	case errors.Is(err, fs.ErrNotExist):
		m += ": the socket does not exist; is nvmmirrord serve running, and is this its admin.socket?"
	case errors.Is(err, unix.ECONNREFUSED) && !isSocket(socket):
		m += ": it is no socket; name the daemon's admin.socket"
	case errors.Is(err, unix.ECONNREFUSED):
		m += ": it was left by one that died; start nvmmirrord serve again"
	case errors.Is(err, fs.ErrPermission):
		m += ": permission denied; run the command as the daemon's user, or as root"
	default:
		m += ": " + bare(err).Error()
	}
	return &Error{Kind: KindUnreachable, Message: m}
}

func isSocket(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode()&fs.ModeSocket != 0
}

// do sends a request and returns its answer, whose body is the caller's to
// close.
func (c *Client) do(ctx context.Context, method, path string, query url.Values, body []byte) (*http.Response, error) {
	u := url.URL{Scheme: "http", Host: "nvmmirrord", Path: path, RawQuery: query.Encode()}
	var rd io.Reader
	if body != nil {
		rd = bytes.NewReader(body)
	}
	r, err := http.NewRequestWithContext(ctx, method, u.String(), rd)
	if err != nil {
		return nil, &Error{Kind: KindUsage, Message: err.Error()}
	}
	resp, err := c.http.Do(r)
	if err != nil {
		return nil, c.broken(ctx, err)
	}
	if resp.StatusCode/100 == 2 {
		return resp, nil
	}
	defer resp.Body.Close()
	e := &Error{}
	text, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil || json.Unmarshal(text, e) != nil || e.Message == "" {
		e = lost("the daemon at %s answers %s %s with %s", c.socket, method, path, resp.Status)
	}
	return nil, e
}

// lost is the error of a request whose answer never came, or makes no sense.
func lost(format string, args ...any) *Error {
	return &Error{Kind: KindFailed, Message: fmt.Sprintf(format, args...), lost: true}
}

// broken is the error of a request that got no whole answer.
func (c *Client) broken(ctx context.Context, err error) error {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e
	case errors.Is(err, context.DeadlineExceeded):
		e = lost("the daemon at %s did not answer in time", c.socket)
		e.Kind = KindTimeout
		return e
	case ctx.Err() != nil:
		return lost("interrupted")
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return lost("the daemon at %s ended before it had answered", c.socket)
	}
	var u *url.Error
	if errors.As(err, &u) {
		err = u.Err
	}
	return lost("the daemon at %s: %v", c.socket, bare(err))
}

// ask sends a request and decodes its answer into v.
func (c *Client) ask(ctx context.Context, method, path string, query url.Values, body []byte, v any) error {
	resp, err := c.do(ctx, method, path, query, body)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return c.broken(ctx, err)
	}
	if err := json.Unmarshal(text, v); err != nil {
		return lost("the daemon at %s answers %s %s with what is not understood: %v", c.socket, method, path, err)
	}
	return nil
}

// Status asks for the status. A daemon that does not say within 10 s how it is, is
// not well.
func (c *Client) Status(ctx context.Context) (s Status, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.statusTime)
	defer cancel()
	err = c.ask(ctx, http.MethodGet, "/v1/status", nil, nil, &s)
	return s, err
}

// Promote makes the node primary and returns its status then.
func (c *Client) Promote(ctx context.Context, force bool) (s Status, err error) {
	return c.change(ctx, "/v1/promote", forced(force))
}

// ContinueAlone makes a primary go on without its peer.
func (c *Client) ContinueAlone(ctx context.Context, force bool) (s Status, err error) {
	return c.change(ctx, "/v1/continue-alone", forced(force))
}

func forced(force bool) url.Values { return url.Values{"force": {strconv.FormatBool(force)}} }

// Demote makes a primary a secondary.
func (c *Client) Demote(ctx context.Context) (s Status, err error) {
	return c.change(ctx, "/v1/demote", nil)
}

// change asks for another role. A daemon that does not say how it is would take the
// request later, when nobody wants it any more: it is not sent.
func (c *Client) change(ctx context.Context, path string, query url.Values) (s Status, err error) {
	if _, err := c.Status(ctx); err != nil {
		return s, err
	}
	err = c.ask(ctx, http.MethodPost, path, query, nil, &s)
	if e := (*Error)(nil); errors.As(err, &e) && e.lost {
		e.Message += "; whether it was done is not known: see nvmmirrord status"
	}
	return s, err
}

// Wait waits until the peer is in-sync or connected; timeout 0: for ever. A daemon
// that does not say when the time is over is not waited for.
func (c *Client) Wait(ctx context.Context, what string, timeout time.Duration) (s Status, err error) {
	if timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout+grace)
		defer cancel()
	}
	err = c.ask(ctx, http.MethodGet, "/v1/wait", url.Values{"for": {what}, "timeout": {timeout.String()}}, nil, &s)
	return s, err
}

// grace is how much longer than asked for the daemon may take to say that the
// time is over.
const grace = 5 * time.Second

// Write makes p one transaction and returns its LSN. timeout 0: it waits for
// the acknowledgement for ever. Where the answer is lost the outcome is
// unknown, as the error says.
func (c *Client) Write(ctx context.Context, off int64, p []byte, timeout time.Duration) (nvmmirror.LSN, error) {
	q := url.Values{"offset": {strconv.FormatInt(off, 10)}}
	if timeout > 0 {
		q.Set("timeout", timeout.String())
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, timeout+grace)
		defer cancel()
	}
	var w written
	resp, err := c.do(ctx, http.MethodPut, "/v1/data", q, p)
	if err != nil {
		return 0, unanswered(err)
	}
	defer resp.Body.Close()
	if err := json.NewDecoder(resp.Body).Decode(&w); err != nil {
		return 0, unanswered(c.broken(ctx, err))
	}
	return w.LSN, nil
}

// unanswered makes the loss of the answer to a write an unknown outcome.
func unanswered(err error) error {
	var e *Error
	if !errors.As(err, &e) || !e.lost {
		return err
	}
	return &Error{Kind: KindOutcomeUnknown, Message: nvmmirror.ErrOutcomeUnknown.Error() + " (" + e.Message + ")"}
}

// Read fills p with the bytes at off. Pieces of MaxRead bytes are each of one
// moment.
func (c *Client) Read(ctx context.Context, off int64, p []byte) error {
	for len(p) > 0 {
		n := min(len(p), MaxRead)
		q := url.Values{"offset": {strconv.FormatInt(off, 10)}, "length": {strconv.Itoa(n)}}
		resp, err := c.do(ctx, http.MethodGet, "/v1/data", q, nil)
		if err != nil {
			return err
		}
		_, err = io.ReadFull(resp.Body, p[:n])
		resp.Body.Close()
		if err != nil {
			return c.broken(ctx, err)
		}
		off, p = off+int64(n), p[n:]
	}
	return nil
}

// Journal copies the live journal's JSON lines to w, whose error is told as it is.
func (c *Client) Journal(ctx context.Context, mode string, w io.Writer) error {
	if _, err := c.Status(ctx); err != nil { // frozen: it would not end
		return err
	}
	resp, err := c.do(ctx, http.MethodGet, "/v1/journal", url.Values{"mode": {mode}}, nil)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	to := &taker{w: w}
	if _, err := io.Copy(to, resp.Body); err != nil {
		if to.err != nil {
			return to.err
		}
		return c.broken(ctx, err)
	}
	trailer := resp.Trailer.Get(errorTrailer)
	if trailer == "" {
		return nil
	}
	e := &Error{}
	if err := json.Unmarshal([]byte(trailer), e); err != nil {
		return lost("the daemon at %s ends with what is not understood: %q", c.socket, trailer)
	}
	return e
}

// taker tells the error of a writer from that of what is copied to it.
type taker struct {
	w   io.Writer
	err error
}

func (t *taker) Write(p []byte) (n int, err error) {
	n, t.err = t.w.Write(p)
	return n, t.err
}
