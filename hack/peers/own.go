package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// tools are what this run builds: the mirror's command, and the guest's load.
type tools struct{ nvmmirrord, diskload string }

func build(ctx context.Context, o options, dir string) (*tools, error) {
	t := &tools{filepath.Join(dir, "nvmmirrord"), filepath.Join(dir, "diskload")}
	builds := [][2]string{{".", "./diskload"}} // where, what
	if o.nvmmirrord == "" {
		builds = append(builds, [2]string{o.root, "./cmd/nvmmirrord"})
	} else {
		var err error
		if t.nvmmirrord, err = filepath.Abs(o.nvmmirrord); err != nil {
			return nil, err
		}
	}
	for _, b := range builds {
		cmd := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-o", dir+"/", b[1])
		cmd.Dir = b[0]
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("go build %s: %w\n%s", b[1], err, out)
		}
	}
	return t, nil
}

// commits is what `nvmmirrord bench commit -o json` prints, of which no more
// is wanted here.
type commits struct {
	P50       float64 `json:"p50_us"`
	Rate      float64 `json:"commits_per_s"`
	Size      int     `json:"size"`
	Ack       string  `json:"ack"`
	Transport string  `json:"transport"`
	Class     string  `json:"class"`
	Identical bool    `json:"identical"`
}

// benchArgs runs a pair in two processes, over TCP_MD5SIG, both acknowledging,
// where the scheduler puts them, as it does the peers.
func benchArgs(size, committers int, d time.Duration, dir string) []string {
	return []string{"bench", "commit", "--size", fmt.Sprint(size), "--committers", fmt.Sprint(committers), "--ack", "both", "--transport", "md5sig", "--placement", "free",
		"--region-size", "64MiB", "--journal-size", "64MiB", "--duration", d.String(), "--dir", dir, "-o", "json"}
}

func readCommits(out string, size int) (*commits, error) {
	var c commits
	if err := json.Unmarshal([]byte(out), &c); err != nil {
		return nil, fmt.Errorf("nvmmirrord bench commit: %w in %q", err, out)
	}
	if !c.Identical || c.Ack != "both" || c.Transport != "md5sig" || c.Size != size || c.P50 <= 0 {
		return nil, fmt.Errorf("nvmmirrord bench commit did something else: %+v", c)
	}
	return &c, nil
}

// commit measures commits of a pair. On a machine that is very busy the nodes of
// a new pair may not meet in the time that a promotion waits: it is begun anew.
func commit(size int, do func() (string, error)) (*commits, error) {
	for tries := 1; ; tries++ {
		out, err := do()
		if err == nil {
			return readCommits(out, size)
		}
		if tries == 3 || !strings.Contains(err.Error(), "no equally blank peer is connected") {
			return nil, err
		}
		fmt.Fprintf(os.Stderr, "\nbegun anew: %v\n", err)
	}
}

// own is a mirrored pair. Each round is a pair of its own, whose regions are
// compared at its end.
type own struct {
	nvmmirrord, dir string
	rounds          int
	class           string
}

func (o *own) name() string { return "nvmmirror" }

func (o *own) round(ctx context.Context, d time.Duration) (float64, error) {
	c, err := commit(size, func() (string, error) {
		return run(ctx, nil, append([]string{o.nvmmirrord}, benchArgs(size, 1, d, o.dir)...)...)
	})
	if err != nil {
		return 0, err
	}
	o.rounds++
	o.class = c.Class
	return c.P50, nil
}

func (o *own) verify(context.Context) (string, error) {
	return fmt.Sprintf("two processes, TCP_MD5SIG, ack both, %s memory; both regions identical after each of %d rounds", o.class, o.rounds), nil
}

func (o *own) close() {}
