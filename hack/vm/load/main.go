// Command load runs inside a guest that is killed under it. It recovers the
// regions on the guest's NVDIMMs, compares them with what the host knows to
// have been acknowledged, and then commits until it is killed, naming each
// acknowledged transaction on its standard output, which is the serial line:
//
//	found KEY N   recovery kept the transactions up to N of KEY
//	restarted P, promoted P, refused WHY
//	              how the pair came back, and what its primary's region is
//	loading       all was compared; from here on transactions are committed
//	ack KEY N     transaction N of KEY is acknowledged
//
// KEY is one sequence of transactions: of a stripe of a volume; or the regions
// that are published one after the other in a directory; or, after ".tx", the
// transactions in some of these.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	var r run
	flag.Uint64Var(&r.seed, "seed", 1, "what the transactions follow from")
	flag.StringVar(&r.ext4, "ext4", "/mnt/ext4", "directory on ext4")
	flag.StringVar(&r.xfs, "xfs", "/mnt/xfs", "directory on XFS")
	flag.StringVar(&r.device, "devdax", "", "devdax device")
	flag.BoolVar(&r.create, "create", false, "create the regions first")
	flag.BoolVar(&r.failover, "failover", false, "promote the pair's secondary before its primary is started")
	flag.BoolVar(&r.idle, "idle", false, "end when all was compared")
	flag.DurationVar(&patience, "patience", 90*time.Second, "how long each wait may take")
	known := flag.String("acknowledged", "", "KEY=N,... as the host knows it")
	flag.Parse()
	r.acked = map[string]uint64{}
	for _, word := range strings.Split(*known, ",") {
		key, count, _ := strings.Cut(word, "=")
		var n uint64
		if word == "" {
			continue
		}
		if _, err := fmt.Sscan(count, &n); err != nil {
			fmt.Println("error: -acknowledged:", word)
			os.Exit(2)
		}
		r.acked[key] = n
	}
	if err := r.run(); err != nil {
		fmt.Println("error:", strings.ReplaceAll(err.Error(), "\n", "; "))
		os.Exit(1)
	}
}

// patience bounds each wait. An emulated machine on a busy host is slow: the
// host knows how slow.
var patience time.Duration

type run struct {
	seed                   uint64
	ext4, xfs, device      string
	create, failover, idle bool
	acked                  map[string]uint64

	mu sync.Mutex // one line at a time
}

func (r *run) say(format string, args ...any) {
	r.mu.Lock()
	defer r.mu.Unlock()
	fmt.Printf(format+"\n", args...)
}

// run has a volume by itself on each file system, a pair between XFS and the
// device, and a creator of regions on each file system.
func (r *run) run() error {
	volumes := []*volume{
		{name: "ext4", path: r.ext4 + "/alone.nvm", run: r},
		{name: "xfs", path: r.xfs + "/alone.nvm", run: r},
	}
	p := &pair{run: r, paths: [2]string{r.xfs + "/pair.nvm", r.device}}
	creators := []*creator{{run: r, name: "new-ext4", dir: r.ext4 + "/new"}, {run: r, name: "new-xfs", dir: r.xfs + "/new"}}
	if r.create {
		for _, c := range creators {
			if err := os.Mkdir(c.dir, 0o700); err != nil {
				return err
			}
		}
		unix.Sync() // the directories; regions are for Create to make durable
		for _, path := range []string{volumes[0].path, volumes[1].path, p.paths[0], p.paths[1]} {
			if err := createRegion(path); err != nil {
				return err
			}
		}
	}
	for _, c := range creators {
		if err := c.verify(); err != nil {
			return fmt.Errorf("%s: %w", c.name, err)
		}
	}
	for _, v := range volumes {
		if err := v.open(nil); err != nil {
			return err
		}
		if err := v.verify(); err != nil {
			return fmt.Errorf("%s: %w", v.name, err)
		}
	}
	primary, err := p.verify()
	if err != nil {
		return fmt.Errorf("pair: %w", err)
	}
	r.say("loading")
	if r.idle {
		for _, v := range append(volumes, p.nodes[0], p.nodes[1]) {
			if err := v.Close(); err != nil {
				return fmt.Errorf("close %s: %w", v.path, err)
			}
		}
		return nil
	}
	failed := make(chan error)
	for _, v := range append(volumes, primary) {
		for stripe := range stripes {
			go func() { failed <- v.write(stripe) }()
		}
	}
	for _, c := range creators {
		go func() { failed <- c.work() }()
	}
	err = <-failed
	if err == nil {
		err = errors.New("a writer ended")
	}
	return err
}
