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
