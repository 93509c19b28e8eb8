package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/nvmmirror/nvmmirror/internal/loopback"
)

// metrics are the lines of a node's /metrics.
func (n *node) metrics() string {
	n.t.Helper()
	c := http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", n.socket)
		},
		DisableKeepAlives: true,
	}}
	resp, err := c.Get("http://node/metrics")
	if err != nil {
		n.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		n.t.Fatal(err)
	}
	return string(b)
}

func (n *node) shows(metrics ...string) bool {
	n.t.Helper()
	text := "\n" + n.metrics()
	for _, m := range metrics {
		if !strings.Contains(text, "\nnvmmirror_"+m+"\n") {
			return false
		}
	}
	return true
}

// A daemon whose region's file is no longer at its path says so.
func TestRegionRemoved(t *testing.T) {
	t.Parallel()
	n := newNode(t, directory(t), "a", "", "")
	n.start()
	gone := "the region file " + n.region + " was removed, moved or replaced"
	told := func() bool {
		return slices.ContainsFunc(n.now().Degraded, func(d string) bool { return strings.HasPrefix(d, gone) })
	}
	if told() || !n.shows("degraded 2") {
		t.Fatalf("at the start: %q", n.now().Degraded)
	}
	away := n.region + ".away"
	if err := os.Rename(n.region, away); err != nil {
		t.Fatal(err)
	}
	if !told() || !n.shows("degraded 3") {
		t.Errorf("moved: %q", n.now().Degraded)
	}
	must(t, "create", n.region, "--size", "4MiB", "--journal-size", "2MiB", "--emulate")
	if !told() {
		t.Errorf("replaced: %q", n.now().Degraded)
	}
	n.eventually("telling in the log", func() bool { return strings.Contains(n.log.String(), gone) })
	if err := os.Rename(away, n.region); err != nil {
		t.Fatal(err)
	}
	if told() || !n.shows("degraded 2") {
		t.Errorf("back in its place: %q", n.now().Degraded)
	}
}

// A daemon whose region's file has become shorter says so before anybody touches
// what is gone.
func TestRegionCutOff(t *testing.T) {
	t.Parallel()
	n := newNode(t, directory(t), "a", "", "")
	n.start()
	info, err := os.Stat(n.region)
	if err != nil {
		t.Fatal(err)
	}
	cut := fmt.Sprintf("the region file %s was cut off: %d bytes of %d are left", n.region, info.Size()-1, info.Size())
	for _, c := range []struct {
		size int64
		told bool
	}{{info.Size(), false}, {info.Size() + 1, false}, {info.Size() - 1, true}} {
		if err := os.Truncate(n.region, c.size); err != nil {
			t.Fatal(err)
		}
		told := slices.ContainsFunc(n.now().Degraded, func(d string) bool { return strings.HasPrefix(d, cut) })
		if told != c.told || n.shows("degraded 3") != c.told {
			t.Errorf("%d bytes: %q", c.size, n.now().Degraded)
		}
	}
	n.eventually("telling in the log", func() bool { return strings.Contains(n.log.String(), cut) })
}

// A daemon whose socket is no longer at its path says so in its log, and to whom it
// still answers.
func TestSocketRemoved(t *testing.T) {
	t.Parallel()
	n := newNode(t, directory(t), "a", "", "")
	n.start()
	// Before that, the daemon asks itself by the path.
	n.eventually("ready", func() bool { return strings.Contains(n.log.String(), `"msg":"ready"`) })
	gone := "the admin socket " + n.socket + " was removed or replaced"
	away := n.socket + ".away"
	if err := os.Rename(n.socket, away); err != nil {
		t.Fatal(err)
	}
	n.eventually("telling in the log", func() bool { return strings.Contains(n.log.String(), gone) })
	other, err := net.Listen("unix", n.socket)
	if err != nil {
		t.Fatal(err)
	}
	path := n.socket
	n.socket = away
	told := func() bool {
		return slices.ContainsFunc(n.now().Degraded, func(d string) bool { return strings.HasPrefix(d, gone) })
	}
	if !told() || !n.shows("degraded 3") {
		t.Errorf("replaced: %q", n.now().Degraded)
	}
	other.Close()
	if err := os.Rename(away, path); err != nil {
		t.Fatal(err)
	}
	n.socket = path
	if told() || !n.shows("degraded 2") {
		t.Errorf("back in its place: %q", n.now().Degraded)
	}
}

// A node whose persistence has failed does not serve before it was restarted: that is
// refused, also where the change of role fails on the way.
func TestRolesWherePersistenceFailed(t *testing.T) {
	t.Parallel()
	for _, of := range []string{"secondary", "primary"} {
		a, b := inSync(t, "")
		n := map[string]*node{"secondary": b, "primary": a}[of]
		if err := os.Truncate(n.region, 0); err != nil {
			t.Fatal(err)
		}
		a.write(0, []byte("x"), "--timeout", "100ms")
		n.eventually("shown to have failed", func() bool { return n.shows("persistence_failed 1") })
		for _, args := range [][]string{{"promote"}, {"promote", "--force"}, {"continue-alone"}, {"continue-alone", "--force"}} {
			n.fails(exitRefused, args, "persistence has failed here", "until the daemon was restarted")
		}
	}
}

// What an operator must be alarmed by has a metric of its own.
func TestMetricsOfTrouble(t *testing.T) {
	t.Parallel()
	a, b := inSync(t, "")
	if !a.shows("serving 1", "commits_waiting 0", `peer_state{state="in-sync"} 1`, `peer_state{state="lost"} 0`) {
		t.Errorf("in sync:\n%s", a.metrics())
	}
	b.kill()
	a.eventually("shown to wait", func() bool {
		return a.shows("serving 1", "commits_waiting 1", `peer_state{state="in-sync"} 0`, `peer_state{state="lost"} 1`)
	})
	// A store to a page that the file no longer has.
	if err := os.Truncate(a.region, 0); err != nil {
		t.Fatal(err)
	}
	a.write(0, []byte("x"), "--timeout", "100ms")
	a.eventually("shown to have failed", func() bool { return a.shows("persistence_failed 1", "journal_damaged 0") })

	d := newNode(t, directory(t), "d", "", fmt.Sprintf("[peer]\ntransport = \"plain\"\nlisten = %q\naddress = %q\n", loopback.AddrPort(t), loopback.AddrPort(t)))
	if err := os.Rename(golden(t, "damaged"), d.region); err != nil {
		t.Fatal(err)
	}
	d.start()
	if !d.shows("journal_damaged 1", "persistence_failed 0") {
		t.Errorf("damaged:\n%s", d.metrics())
	}
}
