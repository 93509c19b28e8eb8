package admin

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// serveVolume serves a blank volume on a socket.
func serveVolume(t testing.TB, peer *nvmmirror.Peer, hook JournalFunc) (*Server, *Client, string) {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "nvmmirror-test-")
	if err != nil {
		t.Skip("needs /dev/shm: ", err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	region, socket := filepath.Join(dir, "r.nvm"), filepath.Join(dir, "r.sock")
	if err := nvmmirror.Create(region, nvmmirror.CreateOptions{Size: 8 << 20, JournalSize: 2 << 20, Accept: pmem.Emulated}); err != nil {
		t.Fatal(err)
	}
	v, err := nvmmirror.Open(region, nvmmirror.Options{Peer: peer})
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(socket, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(ServerOptions{Volume: v, Journal: hook, Log: zap.NewNop()})
	s.Serve(l)
	c := NewClient(socket)
	t.Cleanup(func() {
		c.Close()
		s.Stop()
		if err := v.Close(); err != nil {
			t.Error(err)
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, c, socket
}

// lonely is a peer that is not there.
func lonely(t *testing.T) *nvmmirror.Peer {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	gone := l.Addr().(*net.TCPAddr).AddrPort()
	l.Close()
	tr, err := transport.NewPlain(gone.Addr(), transport.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return &nvmmirror.Peer{Listen: "127.0.0.1:0", Address: gone.String(), Timeout: 200 * time.Millisecond, Transport: tr}
}

func kindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return ""
}

func TestDataRoundTrip(t *testing.T) {
	_, c, _ := serveVolume(t, nil, nil)
	ctx := context.Background()
	s, err := c.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	most := s.Daemon.MaxTransaction
	if most < 500<<10 {
		t.Fatalf("a transaction of a 2 MiB journal holds %d bytes", most)
	}
	p := bytes.Repeat([]byte("largest "), int(most)/8)
	lsn, err := c.Write(ctx, 4096, p, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if s, err = c.Status(ctx); err != nil || s.Acked < lsn || s.Counters.Commits != 1 {
		t.Errorf("wrote up to LSN %v, status %v with %d commits, %v", lsn, s.Acked, s.Counters.Commits, err)
	}
	got := make([]byte, 6<<20) // more than one request
	if err := c.Read(ctx, 4096, got); err != nil {
		t.Fatal(err)
	}
	want := make([]byte, len(got))
	copy(want, p)
	if !bytes.Equal(got, want) {
		t.Error("what was read is not what was written")
	}
	if lsn, err := c.Write(ctx, 0, nil, 0); err != nil || lsn != s.Applied {
		t.Errorf("nothing written: LSN %v, %v", lsn, err)
	}
}

func TestDataRefused(t *testing.T) {
	_, c, _ := serveVolume(t, nil, nil)
	ctx := context.Background()
	s, err := c.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(ctx, 0, make([]byte, s.Daemon.MaxTransaction+1), 0); kindOf(err) != KindRange {
		t.Errorf("too large: %v", err)
	}
	if _, err := c.Write(ctx, s.Size-1, []byte("ab"), 0); kindOf(err) != KindRange {
		t.Errorf("over the end: %v", err)
	}
	if err := c.Read(ctx, s.Size-1, make([]byte, 2)); kindOf(err) != KindRange {
		t.Errorf("read over the end: %v", err)
	}
	if _, err := c.Write(ctx, -1, []byte("ab"), 0); kindOf(err) != KindUsage {
		t.Errorf("negative: %v", err)
	}
	if now, err := c.Status(ctx); err != nil || now.Committed != s.Committed {
		t.Errorf("something was written: %v to %v, %v", s.Committed, now.Committed, err)
	}
}

func TestRequestsThatMakeNoSense(t *testing.T) {
	_, c, _ := serveVolume(t, nil, nil)
	for _, r := range []struct{ method, path string }{
		{http.MethodGet, "/"},
		{http.MethodDelete, "/v1/data"},
		{http.MethodPost, "/v1/promote?force=perhaps"},
		{http.MethodGet, "/v1/wait"},
		{http.MethodGet, "/v1/wait?for=in-sync&timeout=soon"},
		{http.MethodGet, "/v1/data?offset=0"},
		{http.MethodGet, "/v1/data?offset=0&length=99999999999"},
		{http.MethodGet, "/v1/data?offset=0x10&length=1"},
		{http.MethodPut, "/v1/data"},
		{http.MethodGet, "/v1/journal?mode=eat"},
	} {
		path, query, _ := strings.Cut(r.path, "?")
		values := map[string][]string{}
		for part := range strings.SplitSeq(query, "&") {
			if k, v, ok := strings.Cut(part, "="); ok {
				values[k] = []string{v}
			}
		}
		resp, err := c.do(context.Background(), r.method, path, values, nil)
		if err == nil {
			resp.Body.Close()
			t.Errorf("%s %s: %s", r.method, r.path, resp.Status)
		} else if kindOf(err) != KindUsage {
			t.Errorf("%s %s: kind %q, %v", r.method, r.path, kindOf(err), err)
		}
	}
}

func TestNotPrimary(t *testing.T) {
	_, c, _ := serveVolume(t, lonely(t), nil)
	ctx := context.Background()
	if _, err := c.Write(ctx, 0, []byte("x"), 0); kindOf(err) != KindNotPrimary {
		t.Errorf("write: %v", err)
	}
	if err := c.Read(ctx, 0, make([]byte, 1)); kindOf(err) != KindNotPrimary {
		t.Errorf("read: %v", err)
	}
	if _, err := c.Wait(ctx, "connected", 50*time.Millisecond); kindOf(err) != KindTimeout || !strings.Contains(err.Error(), "the peer is lost") {
		t.Errorf("wait: %v", err)
	}
	if s, err := c.Promote(ctx, true); err != nil || s.Role != "primary" {
		t.Errorf("promote: %v, %v", s.Role, err)
	}
	if _, err := c.Write(ctx, 0, []byte("x"), 0); err != nil {
		t.Error(err)
	}
}

// A wait, and a promotion that waits for a peer, end when the daemon stops.
func TestStopEndsWaits(t *testing.T) {
	s, c, _ := serveVolume(t, lonely(t), nil)
	results := make(chan error, 2)
	go func() { _, err := c.Wait(context.Background(), "in-sync", 0); results <- err }()
	go func() { _, err := c.Promote(context.Background(), false); results <- err }()
	deadline := time.Now().Add(10 * time.Second)
	for s.inHand.Load() < 2 {
		if time.Now().After(deadline) {
			t.Fatal("the requests did not arrive")
		}
		time.Sleep(time.Millisecond)
	}
	start := time.Now()
	s.Stop()
	for range 2 {
		if err := <-results; err == nil {
			t.Error("a request succeeded in vain")
		} else {
			t.Log(err)
		}
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("stopped after %v", d)
	}
	if _, err := c.Status(context.Background()); err == nil || err.Error() != errStopping.Message {
		t.Errorf("status after the stop: %v", err)
	}
}

// endless is a journal without an end.
func endless(_ context.Context, w io.Writer, _ *nvmmirror.Volume, _ string) error {
	for line := bytes.Repeat([]byte("x"), 64<<10); ; {
		if _, err := w.Write(line); err != nil {
			return err
		}
	}
}

// A client that takes a long answer is told why it ends.
func TestStopIsTold(t *testing.T) {
	s, c, _ := serveVolume(t, nil, endless)
	result := make(chan error, 1)
	begun, first := make(chan struct{}), sync.Once{}
	go func() {
		result <- c.Journal(context.Background(), "ls", writerFunc(func(p []byte) (int, error) {
			first.Do(func() { close(begun) })
			return len(p), nil
		}))
	}()
	<-begun
	s.Stop()
	if err := <-result; err == nil || err.Error() != errStopping.Message {
		t.Errorf("%v", err)
	}
}

// A journal of which nothing is shown, as verify shows nothing of a sound one, ends
// with its client, and with the daemon.
func TestSilentJournalEnds(t *testing.T) {
	begun, ended := make(chan struct{}), make(chan struct{})
	s, c, _ := serveVolume(t, nil, func(ctx context.Context, _ io.Writer, _ *nvmmirror.Volume, _ string) error {
		begun <- struct{}{}
		select {
		case <-ctx.Done():
			ended <- struct{}{}
		case <-t.Context().Done(): // the test has failed
		}
		return ctx.Err()
	})
	for _, who := range []string{"client", "daemon"} {
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		result := make(chan error, 1)
		go func() { result <- c.Journal(ctx, "verify", io.Discard) }()
		<-begun
		want := "interrupted"
		if who == "client" {
			cancel()
		} else {
			want = errStopping.Message
			go s.Stop()
		}
		select {
		case <-ended:
		case <-time.After(10 * time.Second):
			t.Fatalf("it goes on without its %s", who)
		}
		if err := <-result; err == nil || err.Error() != want {
			t.Errorf("%s: %v", who, err)
		}
	}
}

type writerFunc func(p []byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A client that takes nothing of a long answer does not hold up the stop.
func TestStopEndsAnswers(t *testing.T) {
	for _, path := range []string{"/v1/journal?mode=dump", fmt.Sprintf("/v1/data?offset=0&length=%d", MaxRead)} {
		t.Run(path, func(t *testing.T) {
			s, _, socket := serveVolume(t, nil, endless)
			conn, err := net.Dial("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: x\r\n\r\n", path)
			// What has come fills the socket a moment later.
			conn.SetReadDeadline(time.Now().Add(10 * time.Second))
			if _, err := io.ReadFull(conn, make([]byte, 16)); err != nil {
				t.Fatal(err)
			}
			time.Sleep(100 * time.Millisecond)
			start := time.Now()
			s.Stop()
			if d := time.Since(start); d > 5*time.Second {
				t.Errorf("stopped after %v", d)
			}
		})
	}
}

// The end of a client ends its wait for the acknowledgement.
func TestClientGone(t *testing.T) {
	s, c, _ := serveVolume(t, lonely(t), nil)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { _, err := c.Wait(ctx, "in-sync", 0); done <- err }()
	deadline := time.Now().Add(10 * time.Second)
	for s.inHand.Load() < 1 {
		if time.Now().After(deadline) {
			t.Fatal("the request did not arrive")
		}
		time.Sleep(time.Millisecond)
	}
	cancel()
	if err := <-done; err == nil || err.Error() != "interrupted" {
		t.Errorf("%v", err)
	}
	for s.inHand.Load() > 0 {
		if time.Now().After(deadline) {
			t.Fatal("the daemon still waits for a client that is gone")
		}
		time.Sleep(time.Millisecond)
	}
}

func TestJournalHook(t *testing.T) {
	hook := func(_ context.Context, w io.Writer, v *nvmmirror.Volume, mode string) error {
		for i := range 3 {
			fmt.Fprintf(w, `{"mode":%q,"i":%d,"size":%d}`+"\n", mode, i, v.Size())
		}
		if mode == "verify" {
			return &journal.DamageError{At: 64, Acked: 128, Why: errors.New("a test")}
		}
		return nil
	}
	_, c, _ := serveVolume(t, nil, hook)
	var b bytes.Buffer
	if err := c.Journal(context.Background(), "ls", &b); err != nil {
		t.Fatal(err)
	}
	if want := `{"mode":"ls","i":2,"size":8388608}` + "\n"; strings.Count(b.String(), "\n") != 3 || !strings.HasSuffix(b.String(), want) {
		t.Errorf("%q", b.String())
	}
	b.Reset()
	err := c.Journal(context.Background(), "verify", &b)
	if kindOf(err) != KindDamage || strings.Count(b.String(), "\n") != 3 {
		t.Errorf("%v after %q", err, b.String())
	}
}

// A writer that takes no more is told of as such: it is not the daemon's.
func TestJournalIntoAFullWriter(t *testing.T) {
	_, c, _ := serveVolume(t, nil, endless)
	full := errors.New("full")
	if err := c.Journal(context.Background(), "ls", writerFunc(func([]byte) (int, error) { return 0, full })); err != full {
		t.Errorf("%v", err)
	}
}

func TestMetrics(t *testing.T) {
	_, c, _ := serveVolume(t, nil, nil)
	if _, err := c.Write(context.Background(), 0, []byte("x"), 0); err != nil {
		t.Fatal(err)
	}
	resp, err := c.do(context.Background(), http.MethodGet, "/metrics", nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	text := string(b)
	for _, want := range []string{
		"# TYPE nvmmirror_commits_total counter\nnvmmirror_commits_total 1\n",
		"# TYPE nvmmirror_primary gauge\nnvmmirror_primary 1\n",
		"nvmmirror_in_sync 0\n", "nvmmirror_degraded 2\n", "nvmmirror_volume_bytes 8.388608e+06\n",
		"nvmmirror_serving 1\n", "nvmmirror_commits_waiting 0\n", "nvmmirror_persistence_failed 0\n", "nvmmirror_journal_damaged 0\n",
		"nvmmirror_resync_done_bytes 0\n", "nvmmirror_resync_total_bytes 0\n",
		`nvmmirror_peer_state{state="none"} 1` + "\n", `nvmmirror_peer_state{state="in-sync"} 0` + "\n",
		"# TYPE nvmmirror_kernel_tcp_md5_failures_total counter\n",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q in\n%s", want, text)
		}
	}
	for line := range strings.SplitSeq(strings.TrimSpace(text), "\n") {
		if !strings.HasPrefix(strings.TrimPrefix(strings.TrimPrefix(line, "# HELP "), "# TYPE "), "nvmmirror_") {
			t.Errorf("a foreign line: %q", line)
		}
	}
}

// A metric that the operator's guide names in full is one that there is, that of
// signatures among them: its name is not the counter's of status.
func TestDocumentedMetrics(t *testing.T) {
	guide, err := os.ReadFile("../../docs/OPERATIONS.md")
	if err != nil {
		t.Fatal(err)
	}
	const signatures = "nvmmirror_kernel_tcp_md5_failures_total"
	named := regexp.MustCompile(`nvmmirror_[a-z0-9_]+`).FindAllString(string(guide), -1)
	if !slices.Contains(named, signatures) {
		t.Errorf("%s is not named", signatures)
	}
	for _, name := range named {
		if !slices.ContainsFunc(slices.Concat(metrics, kernelMetrics), func(m metric) bool { return m.name == name }) {
			t.Errorf("no metric %s", name)
		}
	}
}

func TestResyncMetrics(t *testing.T) {
	s := nvmmirror.Status{Resync: &nvmmirror.Progress{Done: 3, Total: 7}}
	for name, want := range map[string]float64{"nvmmirror_resync_done_bytes": 3, "nvmmirror_resync_total_bytes": 7} {
		i := slices.IndexFunc(metrics, func(m metric) bool { return m.name == name })
		if got := metrics[i].of(&s, nil); got != want {
			t.Errorf("%s is %v", name, got)
		}
	}
}

func TestClassify(t *testing.T) {
	for _, c := range []struct {
		err  error
		want Kind
	}{
		{errors.New("x"), KindFailed},
		{fmt.Errorf("x: %w", nvmmirror.ErrOutcomeUnknown), KindOutcomeUnknown},
		{fmt.Errorf("x: %w", &nvmmirror.ErrNotPrimary{Primary: "p"}), KindNotPrimary},
		{fmt.Errorf("x: %w", &nvmmirror.RefusedError{Why: "w"}), KindRefused},
		{fmt.Errorf("x: %w", &nvmmirror.CorruptError{What: "w"}), KindDamage},
		{fmt.Errorf("x: %w", &journal.DamageError{Why: errors.New("y")}), KindDamage},
		{fmt.Errorf("x: %w", nvmmirror.ErrTooLarge), KindRange},
		{fmt.Errorf("x: %w", newError(KindTimeout, "y")), KindTimeout},
	} {
		if got := classify(c.err); got.Kind != c.want {
			t.Errorf("%v: %s, not %s", c.err, got.Kind, c.want)
		}
	}
}

func TestUnreachable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	c := NewClient(path)
	defer c.Close()
	_, err := c.Write(context.Background(), 0, []byte("x"), 0)
	if kindOf(err) != KindUnreachable || !strings.Contains(err.Error(), "the socket does not exist") {
		t.Errorf("%v", err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = c.Status(context.Background())
	if kindOf(err) != KindUnreachable || !strings.Contains(err.Error(), path+": it is no socket") {
		t.Errorf("%v", err)
	}
}

// A daemon that is stopped, or stuck, keeps nobody waiting who asks how it is.
func TestStatusUnanswered(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := NewClient(path)
	defer c.Close()
	c.statusTime = 10 * time.Millisecond
	if _, err := c.Status(context.Background()); kindOf(err) != KindTimeout || !strings.Contains(err.Error(), path+" did not answer in time") {
		t.Errorf("%v", err)
	}
	// It would do it later.
	_, promoted := c.Promote(context.Background(), true)
	_, alone := c.ContinueAlone(context.Background(), true)
	_, demoted := c.Demote(context.Background())
	for _, err := range []error{promoted, alone, demoted, c.Journal(context.Background(), "ls", io.Discard)} {
		if kindOf(err) != KindTimeout || strings.Contains(err.Error(), "not known") {
			t.Errorf("%v", err)
		}
	}
}

// Close does not wait for a client that stays in the middle of its data, and says so.
func TestCloseGivesUp(t *testing.T) {
	s, _, socket := serveVolume(t, nil, nil)
	s.closeTime = 50 * time.Millisecond
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "PUT /v1/data?offset=0 HTTP/1.1\r\nHost: x\r\nContent-Length: 4096\r\n\r\nabc")
	for deadline := time.Now().Add(10 * time.Second); len(s.writes) == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the request did not arrive")
		}
	}
	if err := s.Close(); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

// A client that goes away in the middle of its data is no warning.
func TestClientGoneInBody(t *testing.T) {
	seen, logs := observer.New(zap.DebugLevel)
	first, _, socket := serveVolume(t, nil, nil)
	socket += "2"
	l, err := Listen(socket, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(ServerOptions{Volume: first.o.Volume, Log: zap.New(seen)})
	s.Serve(l)
	defer s.Close()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "PUT /v1/data?offset=0 HTTP/1.1\r\nHost: x\r\nContent-Length: 4096\r\n\r\nabc")
	conn.Close()
	for deadline := time.Now().Add(10 * time.Second); logs.Len() == 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("nothing was logged")
		}
	}
	if l := logs.All()[0]; l.Level != zap.DebugLevel || !strings.Contains(fmt.Sprint(l.ContextMap()), "nothing of it was written") {
		t.Errorf("%+v", l)
	}
}

// A daemon that dies while a transaction waits leaves its outcome unknown.
func TestWriteUnanswered(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := l.Accept()
		if err != nil {
			return
		}
		conn.Read(make([]byte, 1<<10))
		conn.Close()
	}()
	c := NewClient(path)
	defer c.Close()
	_, err = c.Write(context.Background(), 0, []byte("x"), 0)
	if kindOf(err) != KindOutcomeUnknown {
		t.Errorf("%v", err)
	}
	l.Close()
	<-done
}
