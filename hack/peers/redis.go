package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// redis is a primary and a replica, each with an append-only file that is
// synced before it replies. What WAIT counts has the write in its memory: the
// replica acknowledges before it has written its own file.
type redis struct {
	server  [2]*server
	client  [2]*respConn // of each, over a Unix socket
	tcp     *respConn    // of the primary
	aof     [2]string    // the directory of the append-only file
	version string
	put     []byte
	n       int64
}

func startRedis(ctx context.Context, dir string) (_ peer, err error) {
	path, err := program("redis-server", "redis-server")
	if err != nil {
		return nil, err
	}
	r := &redis{}
	defer func() {
		if err != nil {
			r.close()
		}
	}()
	port, err := freePorts(2)
	if err != nil {
		return nil, err
	}
	for i, name := range []string{"redis", "redis-replica"} {
		data := filepath.Join(dir, name)
		if err := os.Mkdir(data, 0o700); err != nil {
			return nil, err
		}
		r.aof[i] = filepath.Join(data, "appendonlydir")
		socket := filepath.Join(data, "socket")
		argv := []string{path, "--port", port[i], "--bind", "127.0.0.1", "--unixsocket", socket, "--dir", data, "--daemonize", "no",
			"--save", "", "--appendonly", "yes", "--appendfsync", "always", "--auto-aof-rewrite-percentage", "0", "--repl-diskless-sync", "yes", "--repl-diskless-sync-delay", "0"}
		if i == 1 {
			argv = append(argv, "--replicaof", "127.0.0.1 "+port[0])
		}
		if r.server[i], err = start(name, dir, nil, argv...); err != nil {
			return nil, err
		}
		err = r.server[i].await(ctx, "there", func() (err error) {
			r.client[i], err = dialRESP(unix.AF_UNIX, &unix.SockaddrUnix{Name: socket})
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	err = r.server[1].await(ctx, "following", func() error { return says(r.client[1], "INFO", "replication", "master_link_status:up") })
	if err != nil {
		return nil, err
	}
	number, err := strconv.Atoi(port[0])
	if err != nil {
		return nil, err
	}
	if r.tcp, err = dialRESP(unix.AF_INET, &unix.SockaddrInet4{Port: number, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return nil, err
	}
	info, err := r.client[0].do("INFO", "server")
	if err != nil {
		return nil, err
	}
	_, version, _ := strings.Cut(info, "redis_version:")
	r.version, _, _ = strings.Cut(version, "\r")
	r.put = request(request(nil, "SET", "key", strings.Repeat("x", size)), "WAIT", "1", "0")
	// The first ones wait for what a replica does once it follows.
	return r, r.server[1].await(ctx, "acknowledging", func() error { return r.set(r.tcp) })
}

func (r *redis) name() string { return "Redis " + r.version + ", SET + WAIT 1 over TCP" }

// set is one write; WAIT's reply must be 1.
func (r *redis) set(c *respConn) error {
	if err := c.send(r.put); err != nil {
		return err
	}
	for _, want := range []string{"OK", "1"} {
		if got, err := c.reply(); err != nil || got != want {
			return errors.Join(fmt.Errorf("reply %q, not %q", got, want), err)
		}
	}
	r.n++
	return nil
}

func (r *redis) round(ctx context.Context, d time.Duration) (p50 float64, err error) {
	p50, _, err = timed(ctx, d, func() error { return r.set(r.tcp) })
	return p50, err
}

// redisLocal is the same servers, with the client that costs least.
type redisLocal struct{ *redis }

func (r redisLocal) name() string { return "Redis " + r.version + ", SET + WAIT 1 over a Unix socket" }

func (r redisLocal) round(ctx context.Context, d time.Duration) (p50 float64, err error) {
	p50, _, err = timed(ctx, d, func() error { return r.set(r.client[0]) })
	return p50, err
}

func (r redisLocal) close() {} // redis does

func (r *redis) verify(ctx context.Context) (string, error) {
	var written [2]int64
	for i, c := range r.client {
		err := errors.Join(
			says(c, "CONFIG GET", "appendfsync", "appendfsync always"),
			says(c, "CONFIG GET", "no-appendfsync-on-rewrite", "no-appendfsync-on-rewrite no"),
			says(c, "INFO", "persistence", "aof_enabled:1"),
			says(c, "INFO", "persistence", "aof_last_write_status:ok"))
		if err != nil {
			return "", fmt.Errorf("%s: %w", r.server[i].name, err)
		}
		files, err := filepath.Glob(r.aof[i] + "/*.aof")
		if err != nil {
			return "", err
		}
		for _, f := range files {
			st, err := os.Stat(f)
			if err != nil {
				return "", err
			}
			written[i] += st.Size()
		}
		if written[i] < r.n*size {
			return "", fmt.Errorf("%s: %d bytes in its append-only file after %d writes of %d", r.server[i].name, written[i], r.n, size)
		}
	}
	return fmt.Sprintf("WAIT returned 1 each time (%d), appendfsync is always on both, their append-only files have %d and %d kB",
		r.n, written[0]/1e3, written[1]/1e3), nil
}

// says asks for one thing; the reply must contain a word.
func says(c *respConn, command, arg, want string) error {
	got, err := c.do(append(strings.Fields(command), arg)...)
	if err == nil && !strings.Contains(got, want) {
		err = fmt.Errorf("%s %s: no %q in %q", command, arg, want, got)
	}
	return err
}

func (r *redis) close() {
	r.tcp.close()
	for i := range r.server {
		r.client[i].close()
		r.server[i].stop(syscall.SIGTERM)
	}
}
