package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// etcd is one member: nothing is mirrored.
type etcd struct {
	server  *server
	client  *clientv3.Client
	url     string
	version string
	synced  float64 // before the first put
	n       int64
}

func startEtcd(ctx context.Context, dir string) (_ peer, err error) {
	path, err := program("etcd-server", "etcd")
	if err != nil {
		return nil, err
	}
	port, err := freePorts(2)
	if err != nil {
		return nil, err
	}
	e := &etcd{url: "http://127.0.0.1:" + port[0]}
	defer func() {
		if err != nil {
			e.close()
		}
	}()
	beside := "http://127.0.0.1:" + port[1]
	e.server, err = start("etcd", dir, nil, path, "--name", "peer", "--data-dir", filepath.Join(dir, "etcd"), "--log-level", "warn", "--logger", "zap",
		"--listen-client-urls", e.url, "--advertise-client-urls", e.url,
		"--listen-peer-urls", beside, "--initial-advertise-peer-urls", beside, "--initial-cluster", "peer="+beside)
	if err != nil {
		return nil, err
	}
	err = e.server.await(ctx, "there", func() (err error) {
		e.synced, err = e.syncs(ctx)
		return err
	})
	if err != nil {
		return nil, err
	}
	if e.client, err = clientv3.New(clientv3.Config{Endpoints: []string{e.url}, DialTimeout: 10 * time.Second}); err != nil {
		return nil, err
	}
	err = e.server.await(ctx, "serving", func() error {
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		st, err := e.client.Status(ctx, e.url)
		if err != nil {
			return err
		}
		if st.Leader == 0 {
			return errors.New("no leader")
		}
		e.version = st.Version
		return nil
	})
	if err != nil {
		return nil, err
	}
	e.synced, err = e.syncs(ctx)
	return e, err
}

func (e *etcd) name() string { return "etcd " + e.version + ", put, one member" }

func (e *etcd) round(ctx context.Context, d time.Duration) (p50 float64, err error) {
	value := strings.Repeat("x", size)
	p50, n, err := timed(ctx, d, func() error {
		_, err := e.client.Put(ctx, "key", value)
		return err
	})
	e.n += n
	return p50, err
}

// syncs is how often it has synced its log, by its own count, which skips what
// --unsafe-no-fsync leaves out.
func (e *etcd) syncs(ctx context.Context) (float64, error) {
	const name = "etcd_disk_wal_fsync_duration_seconds_count "
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, e.url+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	r, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, err
	}
	defer r.Body.Close()
	for lines := bufio.NewScanner(r.Body); lines.Scan(); {
		if text, ok := strings.CutPrefix(lines.Text(), name); ok {
			return strconv.ParseFloat(text, 64)
		}
	}
	return 0, fmt.Errorf("etcd has no metric %s", name)
}

func (e *etcd) verify(ctx context.Context) (string, error) {
	after, err := e.syncs(ctx)
	if err != nil {
		return "", err
	}
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", e.server.cmd.Process.Pid))
	if err != nil {
		return "", err
	}
	if strings.Contains(string(line), "unsafe-no-fsync") {
		return "", errors.New("etcd runs with --unsafe-no-fsync")
	}
	if int64(after-e.synced) < e.n {
		return "", fmt.Errorf("etcd synced its log %.0f times in %d puts", after-e.synced, e.n)
	}
	got, err := e.client.Get(ctx, "key")
	if err != nil {
		return "", err
	}
	if len(got.Kvs) != 1 || got.Kvs[0].Version != e.n {
		return "", fmt.Errorf("after %d puts etcd has %v", e.n, got.Kvs)
	}
	return fmt.Sprintf("%d puts, %.0f syncs of its log by its own metric, no --unsafe-no-fsync", e.n, after-e.synced), nil
}

func (e *etcd) close() {
	if e.client != nil {
		e.client.Close()
	}
	e.server.stop(syscall.SIGTERM)
}
