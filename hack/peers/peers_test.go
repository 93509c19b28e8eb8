package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// startPeer starts a peer in a directory of its own, and looks for what is left
// of it at the end.
func startPeer(t *testing.T, start func(context.Context, string) (peer, error)) peer {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "nvmmirror-peers-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	p, err := start(t.Context(), dir)
	var missing *missingError
	if errors.As(err, &missing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.close)
	return p
}

// measured makes a round, which a verification must find.
func measured(t *testing.T, p peer) {
	t.Helper()
	p50, err := p.round(t.Context(), 50*time.Millisecond)
	if err != nil || p50 <= 0 {
		t.Fatalf("%s: %v µs, %v", p.name(), p50, err)
	}
	how, err := p.verify(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %.0f µs; %s", p.name(), p50, how)
}

// refused wants the verification to find that a peer does less than is claimed.
func refused(t *testing.T, p peer, want string) {
	t.Helper()
	if how, err := p.verify(t.Context()); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("%q, %v; wanted is an error with %q", how, err, want)
	}
}

func TestRedis(t *testing.T) {
	p := startPeer(t, startRedis)
	measured(t, p)
	r := p.(*redis)
	measured(t, redisLocal{r})
	if _, err := r.client[1].do("CONFIG", "SET", "appendfsync", "everysec"); err != nil {
		t.Fatal(err)
	}
	refused(t, p, "appendfsync")
	// Without its replica, WAIT does not return 1.
	r.server[1].stop(syscall.SIGTERM)
	r.put = request(request(nil, "SET", "key", "x"), "WAIT", "1", "100")
	if err := r.set(r.client[0]); err == nil || !strings.Contains(err.Error(), `"0"`) {
		t.Errorf("WAIT without a replica: %v", err)
	}
}

func TestPostgres(t *testing.T) {
	p := startPeer(t, startPostgres)
	measured(t, p)
	pg := p.(*postgres)
	set := func(i int, setting string) {
		t.Helper()
		if _, err := pg.ask(t.Context(), i, "ALTER DATABASE postgres SET "+setting); err != nil {
			t.Fatal(err)
		}
	}
	set(0, "synchronous_commit = off")
	refused(t, p, "synchronous_commit")
	set(0, "synchronous_commit = on")
	pg.n += 1000 // as if so many had not been synced
	refused(t, p, "synced")
	pg.server[1].stop(syscall.SIGINT)
	refused(t, p, "sync_state")
}

func TestEtcd(t *testing.T) {
	p := startPeer(t, startEtcd)
	measured(t, p)
	e := p.(*etcd)
	e.synced++ // as if one put had not been synced
	refused(t, p, "synced")
	e.synced, e.n = 0, e.n-1
	refused(t, p, "after")
}

// A server dies in order, and one that does not start says why.
func TestServer(t *testing.T) {
	dir := t.TempDir()
	s, err := start("sleeper", dir, nil, "sleep", "1000")
	if err != nil {
		t.Fatal(err)
	}
	s.stop(syscall.SIGTERM)
	if _, err := os.Stat(fmt.Sprintf("/proc/%d", s.cmd.Process.Pid)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
	s, err = start("failing", dir, nil, "sh", "-c", "echo no luck; exit 3")
	if err != nil {
		t.Fatal(err)
	}
	err = s.await(t.Context(), "there", func() error { return errors.New("not yet") })
	if err == nil || !strings.Contains(err.Error(), "no luck") {
		t.Errorf("%v", err)
	}
	if _, err := start("absent", dir, nil, filepath.Join(dir, "absent")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func TestTable(t *testing.T) {
	rows, err := readPmem(`persist     bytes           C         Go  ratio     best: C         Go  ratio
               64         200        100  0.500         200        100  0.500
          1048576      100000     150000  1.500      100000     150000  1.500
append      bytes           C         Go  ratio     best: C         Go  ratio
             4096         800        500  0.625         800        500  0.625
`)
	if err != nil {
		t.Fatal(err)
	}
	rows = append(rows, row{peer: "DRBD", work: "4 KiB", theirs: 1000, ours: 4000, unit: "/s", target: 4, atLeast: true})
	var b strings.Builder
	if err := printTable(&b, rows); err != nil {
		t.Fatal(err)
	}
	got := strings.Join(strings.Fields(b.String()), " ")
	for _, want := range []string{
		"| libpmem | persist, 64 B | 200 ns | 100 ns | 0.50 | ≤ 1 | yes |",
		"| libpmem | persist, 1 MiB | 100000 ns | 150000 ns | 1.50 | ≤ 1 | no |",
		"| libpmemlog | append, one fence, 4 KiB | 800 ns | 500 ns | 0.62 | ≤ 0.5 | no |",
		"| DRBD | 4 KiB | 1000 /s | 4000 /s | 4.00 | ≥ 4 | yes |",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("no %q in\n%s", want, b.String())
		}
	}
	for _, bad := range []string{"", "64 200 100\n", "persist bytes\n64 0 100\n", "persist bytes\nwhat\n"} {
		if rows, err := readPmem(bad); err == nil {
			t.Errorf("%q gave %v", bad, rows)
		}
	}
}

func TestReadings(t *testing.T) {
	took, err := readPgbench([]byte("0 1 151 0 1700000000 123456\n0 2 149 0 1700000000 123456\n"))
	if err != nil || median(took) != 150 {
		t.Errorf("%v, %v", took, err)
	}
	for _, bad := range []string{"", "0 1\n", "0 1 failed 0 1700000000 123456\n"} {
		if took, err := readPgbench([]byte(bad)); err == nil {
			t.Errorf("%q gave %v", bad, took)
		}
	}
	good := `{"p50_us":15.5,"commits_per_s":60000,"size":64,"ack":"both","transport":"md5sig","class":"emulated","identical":true}`
	if c, err := readCommits(good, 64); err != nil || c.P50 != 15.5 {
		t.Errorf("%v, %v", c, err)
	}
	for _, change := range []string{`"both","async"`, `"md5sig","plain"`, `true,false`, `15.5,0`, `:64,:65`} {
		was, is, _ := strings.Cut(change, ",")
		if c, err := readCommits(strings.Replace(good, was, is, 1), 64); err == nil {
			t.Errorf("%s: %v", change, c)
		}
	}
}
