package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// postgres is a primary and a synchronous standby: an insert returns when both
// have synced its log. The client is pgbench, which waits with less ado than
// one in Go.
type postgres struct {
	server  [2]*server
	target  [2][]string // what tells a client where the server is
	bin     string
	dir     string // the client's
	version string
	synced  int64 // the primary's log, before the first insert
	n       int64
}

const standby = "standby" // its application_name

func startPostgres(ctx context.Context, dir string) (_ peer, err error) {
	bin, err := postgresPrograms()
	if err != nil {
		return nil, err
	}
	as, err := unprivileged()
	if err != nil {
		return nil, err
	}
	p := &postgres{bin: bin, dir: filepath.Join(dir, "pgbench")}
	defer func() {
		if err != nil {
			p.close()
		}
	}()
	var data [2]string
	for i, name := range []string{"postgres", "postgres-standby"} {
		data[i] = filepath.Join(dir, name)
		if err := os.Mkdir(data[i], 0o700); err != nil {
			return nil, err
		}
		if as != nil {
			if err := os.Chown(data[i], int(as.Uid), int(as.Gid)); err != nil {
				return nil, err
			}
		}
	}
	port, err := freePorts(2)
	if err != nil {
		return nil, err
	}
	// Only the socket is listened on; it is in a directory that others cannot
	// enter.
	if _, err := run(ctx, as, bin+"/initdb", "-D", data[0], "-U", "peer", "-A", "trust", "--no-sync", "-N", "--no-instructions"); err != nil {
		return nil, err
	}
	serve := func(i int, settings ...string) error {
		argv := []string{bin + "/postgres", "-D", data[i], "-p", port[i], "-k", data[i]}
		for _, s := range append(settings, "listen_addresses=", "dynamic_shared_memory_type=mmap", "wal_level=replica", "fsync=on", "synchronous_commit=on") {
			argv = append(argv, "-c", s)
		}
		if p.server[i], err = start(filepath.Base(data[i]), dir, as, argv...); err != nil {
			return err
		}
		p.target[i] = []string{"-h", data[i], "-p", port[i], "-U", "peer"}
		return p.server[i].await(ctx, "there", func() error {
			_, err := p.ask(ctx, i, "SELECT 1")
			return err
		})
	}
	if err := serve(0, "synchronous_standby_names="+standby); err != nil {
		return nil, err
	}
	source := fmt.Sprintf("host=%s port=%s user=peer application_name=%s", data[0], port[0], standby)
	if _, err := run(ctx, as, bin+"/pg_basebackup", "-D", data[1], "-d", source, "-R", "-c", "fast", "--no-sync"); err != nil {
		return nil, err
	}
	if err := serve(1); err != nil {
		return nil, err
	}
	if err := p.server[1].await(ctx, "synchronous", func() error { return p.state(ctx) }); err != nil {
		return nil, err
	}
	if _, err := p.ask(ctx, 0, "CREATE TABLE t (v bytea NOT NULL)"); err != nil {
		return nil, err
	}
	if err := os.Mkdir(p.dir, 0o700); err != nil {
		return nil, err
	}
	insert := fmt.Sprintf("INSERT INTO t VALUES ('%s');\n", strings.Repeat("x", size))
	if err := os.WriteFile(p.script(), []byte(insert), 0o600); err != nil {
		return nil, err
	}
	if p.synced, err = p.number(ctx, 0, "SELECT wal_sync FROM pg_stat_wal"); err != nil {
		return nil, err
	}
	p.version, err = p.ask(ctx, 0, "SHOW server_version")
	return p, err
}

func (p *postgres) script() string { return filepath.Join(p.dir, "insert.sql") }

// ask runs a query that gives one value, in a session of its own.
func (p *postgres) ask(ctx context.Context, i int, query string) (string, error) {
	argv := slices.Concat([]string{p.bin + "/psql"}, p.target[i], []string{"-d", "postgres", "-X", "-q", "-tA", "-c", query})
	out, err := run(ctx, nil, argv...)
	return strings.TrimSpace(out), err
}

func (p *postgres) number(ctx context.Context, i int, query string) (int64, error) {
	text, err := p.ask(ctx, i, query)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(text, 10, 64)
}

// postgresPrograms is the directory of the newest version's.
func postgresPrograms() (string, error) {
	paths, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	if err != nil {
		return "", err
	}
	best, newest := "", -1
	for _, path := range paths {
		dir := filepath.Dir(path)
		if v, err := strconv.Atoi(filepath.Base(filepath.Dir(dir))); err == nil && v > newest {
			best, newest = dir, v
		}
	}
	if best == "" {
		path, err := exec.LookPath("postgres")
		if err != nil {
			return "", &missingError{"no PostgreSQL server", "postgresql"}
		}
		best = filepath.Dir(path)
	}
	return best, nil
}

// unprivileged is whom the servers run as: PostgreSQL refuses to run as root.
func unprivileged() (*syscall.Credential, error) {
	if os.Getuid() != 0 {
		return nil, nil
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		if u, err = user.Lookup("nobody"); err != nil {
			return nil, &missingError{what: "PostgreSQL refuses to run as root, and there is no user postgres or nobody"}
		}
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	gid, err2 := strconv.ParseUint(u.Gid, 10, 32)
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, errors.Join(err, err2)
}

func (p *postgres) name() string {
	version, _, _ := strings.Cut(p.version, " ")
	return "PostgreSQL " + version + ", pgbench insert, one synchronous standby"
}

func (p *postgres) state(ctx context.Context) error {
	state, err := p.ask(ctx, 0, "SELECT sync_state FROM pg_stat_replication WHERE state = 'streaming' AND application_name = '"+standby+"'")
	if err == nil && state != "sync" {
		err = fmt.Errorf("pg_stat_replication.sync_state is %q", state)
	}
	return err
}

// round runs pgbench, with a prepared statement, for whole seconds. It logs
// how long each transaction took.
func (p *postgres) round(ctx context.Context, d time.Duration) (float64, error) {
	seconds := fmt.Sprint(max(1, int(d.Seconds())))
	argv := slices.Concat([]string{p.bin + "/pgbench"}, p.target[0],
		[]string{"-n", "-M", "prepared", "-c", "1", "-T", seconds, "-f", p.script(), "-l", "--log-prefix", filepath.Join(p.dir, "log"), "postgres"})
	if _, err := run(ctx, nil, argv...); err != nil {
		return 0, err
	}
	logs, err := filepath.Glob(filepath.Join(p.dir, "log.*"))
	if err != nil || len(logs) != 1 {
		return 0, errors.Join(fmt.Errorf("pgbench left %d logs", len(logs)), err)
	}
	b, err := os.ReadFile(logs[0])
	if err != nil {
		return 0, err
	}
	if err := os.Remove(logs[0]); err != nil {
		return 0, err
	}
	took, err := readPgbench(b)
	if err != nil {
		return 0, err
	}
	p.n += int64(len(took))
	return median(took[len(took)/10:]), nil
}

// readPgbench reads the third word of each line: µs of a transaction.
func readPgbench(log []byte) (took []float64, err error) {
	for line := range strings.Lines(string(log)) {
		words := strings.Fields(line)
		if len(words) < 3 {
			return nil, fmt.Errorf("pgbench logged %q", line)
		}
		us, err := strconv.ParseFloat(words[2], 64)
		if err != nil { // "failed"
			return nil, fmt.Errorf("pgbench logged %q: %w", line, err)
		}
		took = append(took, us)
	}
	if len(took) == 0 {
		return nil, errors.New("pgbench logged no transaction")
	}
	return took, nil
}

func (p *postgres) verify(ctx context.Context) (string, error) {
	if err := p.state(ctx); err != nil {
		return "", err
	}
	for i := range p.server {
		for _, setting := range []string{"fsync", "synchronous_commit"} {
			is, err := p.ask(ctx, i, "SHOW "+setting)
			if err != nil {
				return "", err
			}
			if is != "on" {
				return "", fmt.Errorf("%s: %s is %s", p.server[i].name, setting, is)
			}
		}
	}
	synced, err := p.number(ctx, 0, "SELECT wal_sync FROM pg_stat_wal")
	if err != nil {
		return "", err
	}
	if synced -= p.synced; synced < p.n {
		return "", fmt.Errorf("the primary synced its log %d times in %d inserts", synced, p.n)
	}
	err = p.server[1].await(ctx, "as far as the primary", func() error {
		n, err := p.number(ctx, 1, "SELECT count(*) FROM t")
		if err == nil && n != p.n {
			err = fmt.Errorf("%d rows of %d", n, p.n)
		}
		return err
	})
	return fmt.Sprintf("sync_state is sync, fsync and synchronous_commit are on for both, %d inserts, %d syncs of the primary's log, all rows on the standby", p.n, synced), err
}

func (p *postgres) close() {
	// The primary waits for its standby at the end.
	for i := range p.server {
		p.server[i].stop(syscall.SIGINT)
	}
}
