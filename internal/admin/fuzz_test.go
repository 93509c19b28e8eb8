package admin

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nvmmirror/nvmmirror"
)

// fuzzTime bounds one exchange: none of these waits for anything.
const fuzzTime = 10 * time.Second

// FuzzRequest sends a daemon any bytes at all. Each answer is one of HTTP's,
// an error says its kind, and the daemon goes on; data changes by a PUT alone.
func FuzzRequest(f *testing.F) {
	for _, s := range []string{
		"GET /v1/status HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET /v1/data?offset=0&length=16 HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET /v1/data?offset=8388600&length=9223372036854775807 HTTP/1.1\r\nHost: a\r\n\r\n",
		"PUT /v1/data?offset=4096&timeout=1s HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello",
		"PUT /v1/data?offset=8388607 HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nxy",
		"PUT /v1/data?offset=0 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
		"PUT /v1/data?offset=0 HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n",
		"GET /v1/journal?mode=dump HTTP/1.1\r\nHost: a\r\n\r\n",
		"GET /v1/wait?for=in-sync&timeout=1ms HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST /v1/promote?force=maybe HTTP/1.1\r\nHost: a\r\n\r\n",
		"POST /v1/demote HTTP/1.0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
		"\x16\x03\x01\x00\xa5", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
	} {
		f.Add([]byte(s))
	}
	_, c, socket := serveVolume(f, nil, func(_ context.Context, w io.Writer, _ *nvmmirror.Volume, mode string) error {
		_, err := io.WriteString(w, mode+"\n")
		return err
	})
	f.Fuzz(func(t *testing.T, request []byte) {
		ctx, cancel := context.WithTimeout(context.Background(), fuzzTime)
		defer cancel()
		before := fuzzStatus(ctx, t, c)
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(fuzzTime)) // a socket takes deadlines
		written := make(chan struct{})
		go func() {
			defer close(written)
			conn.Write(request) // the daemon may have hung up
			conn.(*net.UnixConn).CloseWrite()
		}()
		answers(t, conn)
		<-written
		after := fuzzStatus(ctx, t, c)
		if after.Counters.Commits != before.Counters.Commits && !bytes.Contains(request, []byte("PUT /v1/data?")) {
			t.Fatalf("%d commits came of it", after.Counters.Commits-before.Counters.Commits)
		}
	})
}

// fuzzStatus wants a working daemon.
func fuzzStatus(ctx context.Context, t *testing.T, c *Client) Status {
	t.Helper()
	s, err := c.Status(ctx)
	if err != nil || s.Role == "" || s.Counters.BadBlocks != 0 {
		t.Fatalf("the daemon: %+v, %v", s, err)
	}
	return s
}

// answers reads answers until the daemon hangs up.
func answers(t *testing.T, conn net.Conn) {
	t.Helper()
	for in := bufio.NewReader(conn); ; {
		resp, err := http.ReadResponse(in, nil)
		if err != nil {
			var late net.Error
			if errors.As(err, &late) && late.Timeout() {
				t.Fatalf("no answer, and not hung up: %v", err)
			}
			return
		}
		body, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if err != nil {
			return // an answer to HEAD has a length and no body
		}
		// What net/http answers by itself is text.
		if resp.StatusCode/100 == 2 || !strings.HasPrefix(resp.Header.Get("Content-Type"), "application/json") || len(body) == 0 {
			continue
		}
		var e Error
		if err := json.Unmarshal(body, &e); err != nil || e.Kind == "" || e.Message == "" {
			t.Fatalf("%s with %q", resp.Status, body)
		}
	}
}

// FuzzAnswer gives the client any bytes for an answer: its error is an *Error,
// and a write whose answer makes no sense is of unknown outcome, or done.
func FuzzAnswer(f *testing.F) {
	for _, s := range []string{
		"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{\"lsn\": 64}",
		"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n{\"lsn\"",
		"HTTP/1.1 409 Conflict\r\nContent-Length: 33\r\n\r\n{\"kind\":\"refused\",\"error\":\"no\"}  ",
		"HTTP/1.1 500 X\r\n\r\n<html>", "HTTP/1.1 100 Continue\r\n\r\n", "", "{}",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: Nvmmirror-Error\r\n\r\n3\r\n{}\n\r\n0\r\nNvmmirror-Error: x\r\n\r\n",
		"HTTP/1.1 307 T\r\nLocation: http://elsewhere/\r\n\r\n",
	} {
		for what := range byte(4) {
			f.Add([]byte(s), what)
		}
	}
	f.Fuzz(func(t *testing.T, answer []byte, what byte) {
		socket := filepath.Join(t.TempDir(), "s")
		l, err := net.Listen("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			for {
				conn, err := l.Accept()
				if err != nil {
					return
				}
				// The request, as far as it comes at once; it is not judged.
				conn.SetDeadline(time.Now().Add(fuzzTime))
				conn.Read(make([]byte, 4096))
				conn.Write(answer)
				conn.Close()
			}
		}()
		c := NewClient(socket)
		defer func() {
			c.Close()
			l.Close()
			<-ended
		}()
		ctx, cancel := context.WithTimeout(context.Background(), fuzzTime)
		defer cancel()
		switch what % 4 {
		case 0:
			_, err = c.Status(ctx)
		case 1:
			_, err = c.Write(ctx, 0, []byte("x"), time.Second)
		case 2:
			err = c.Read(ctx, 0, make([]byte, 16))
		case 3:
			err = c.Journal(ctx, "ls", io.Discard)
		}
		var e *Error
		if err != nil && !errors.As(err, &e) {
			t.Fatalf("%T: %v", err, err)
		}
		if e != nil && e.Message == "" || ctx.Err() != nil {
			t.Fatalf("%+v, %v", e, ctx.Err())
		}
	})
}
