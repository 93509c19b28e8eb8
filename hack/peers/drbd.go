package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/nvmmirror/nvmmirror/hack/vm"
)

const (
	guestBlock = 4096
	// guestSpan is how much of a device is written to: less than DRBD's
	// activity log covers, so that no write waits for a change of that.
	guestSpan = 64 << 20
	guestBoot = 2 * time.Minute
)

// guest is a machine with three NVDIMMs: DRBD mirrors the first to the second,
// the pair has both its regions on the third.
type guest struct {
	*vm.Guest
	tools  *tools
	setup  string // drbdsetup
	writes int64  // by DRBD
}

// measureDRBD boots a guest, and measures DRBD and the pair in turns.
func measureDRBD(ctx context.Context, o options, t *tools) ([]row, string, error) {
	setup, err := program("drbd-utils", "drbdsetup-84", "/lib/drbd/drbdsetup-84", "/usr/lib/drbd/drbdsetup-84")
	if err != nil {
		return nil, "", err
	}
	meta, err := program("drbd-utils", "drbdmeta", "/usr/sbin/drbdmeta")
	if err != nil {
		return nil, "", err
	}
	// It says what is missing, and prints where the kernel is.
	kernel, err := run(ctx, nil, filepath.Join(o.root, "hack/vm/kernel.sh"))
	if err != nil {
		return nil, "", &missingError{what: err.Error()}
	}
	k, err := vm.FindKernel()
	if errors.Is(err, vm.ErrMissing) {
		return nil, "", &missingError{what: err.Error()}
	}
	if err != nil {
		return nil, "", err
	}
	var memory []*vm.Memory
	for range 3 {
		m, err := vm.NewMemory()
		if err != nil {
			return nil, "", err
		}
		defer m.Close()
		memory = append(memory, m)
	}
	booting, cancel := context.WithTimeout(ctx, guestBoot)
	defer cancel()
	g := &guest{tools: t, setup: setup}
	if g.Guest, err = vm.Boot(booting, k, memory); err != nil {
		return nil, "", err
	}
	defer g.Close()
	if err := g.prepare(ctx, strings.TrimSpace(kernel), meta); err != nil {
		return nil, "", err
	}
	// No write that is measured is the first to its place in the activity log.
	if _, err := g.write(ctx, 32, time.Second); err != nil {
		return nil, "", err
	}
	var rows []row
	for _, depth := range []int{1, 32} {
		r, err := g.compare(ctx, depth, o)
		if err != nil {
			return nil, "", err
		}
		rows = append(rows, *r)
	}
	how, err := g.verify(ctx)
	return rows, fmt.Sprintf("Linux %s in QEMU without KVM; %s, polling for up to %v (0: its own choice)", k.Release(), how, o.guestPoll), err
}

// prepare makes the file system, and both ends of DRBD: two resources of one
// kernel that are connected over loopback, in sync without a copy.
func (g *guest) prepare(ctx context.Context, kernel, meta string) error {
	commands := []string{
		"mkdir -p /run/lock", // drbdmeta locks there
		"modprobe -d " + kernel + " drbd",
		"for i in 0 1 2; do ndctl create-namespace -f -e namespace$i.0 -m fsdax -M mem || exit; done",
		"mkfs.ext4 -q -b 4096 /dev/pmem2 && mkdir -p /mnt/pair && mount -o dax=always /dev/pmem2 /mnt/pair",
	}
	for i := range 2 {
		commands = append(commands,
			fmt.Sprintf("%s --force %d v08 /dev/pmem%d internal create-md", meta, i, i),
			fmt.Sprintf("%s new-resource end%d", g.setup, i),
			fmt.Sprintf("%s new-minor end%d %d 0", g.setup, i, i),
			fmt.Sprintf("%s attach %d /dev/pmem%d /dev/pmem%d internal", g.setup, i, i, i),
		)
	}
	// Patient: a guest that stalls for some seconds has not lost its peer. The
	// timeout, in tenths of a second, has to be below connect-int, of 10 s.
	const patience = "--timeout=99 --ping-timeout=300"
	for i := range 2 {
		commands = append(commands, fmt.Sprintf("%s connect end%d ipv4:127.0.0.1:%d ipv4:127.0.0.1:%d --protocol=C %s", g.setup, i, 7001+i, 7002-i, patience))
	}
	commands = append(commands,
		g.setup+" wait-connect 0 --wfc-timeout=60",
		g.setup+" new-current-uuid 0 --clear-bitmap=yes",
		g.setup+" primary 0",
	)
	for _, c := range commands {
		if _, err := g.run(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// compare measures DRBD's writes and the pair's transactions in turns.
func (g *guest) compare(ctx context.Context, depth int, o options) (*row, error) {
	args := benchArgs(guestBlock, depth, o.guestSlice, "/mnt/pair")
	if o.guestPoll > 0 {
		args = append(args, "--poll", o.guestPoll.String())
	}
	var theirs, ours []float64
	for n := range o.guestRounds {
		w, err := g.write(ctx, depth, o.guestSlice)
		if err != nil {
			return nil, err
		}
		theirs = append(theirs, w)
		c, err := commit(guestBlock, func() (string, error) {
			return g.run(ctx, g.tools.nvmmirrord+" "+strings.Join(args, " "))
		})
		if err != nil {
			return nil, err
		}
		if c.Class != "cacheline" {
			return nil, fmt.Errorf("the pair's memory is %s, not mapped with MAP_SYNC", c.Class)
		}
		ours = append(ours, c.Rate)
		fmt.Fprintf(os.Stderr, "round %d of %d at depth %d: DRBD %s/s, nvmmirror %s/s\n", n+1, o.guestRounds, depth, figure(w), figure(c.Rate))
	}
	return &row{peer: "DRBD 8.4, protocol C", work: fmt.Sprintf("4 KiB, %d outstanding, NVDIMMs in a guest", depth),
		theirs: median(theirs), ours: median(ours), unit: "/s", target: map[int]float64{1: 4, 32: 2}[depth], atLeast: true}, nil
}

func (g *guest) write(ctx context.Context, depth int, slice time.Duration) (float64, error) {
	out, err := g.run(ctx, fmt.Sprintf("%s write /dev/drbd0 %d %d %d", g.tools.diskload, guestSpan, depth, max(1, int(slice.Seconds()))))
	if err != nil {
		return 0, err
	}
	var w struct {
		Writes int64   `json:"writes"`
		Rate   float64 `json:"rate"`
	}
	if err := json.Unmarshal([]byte(out), &w); err != nil {
		return 0, fmt.Errorf("diskload: %w in %q", err, out)
	}
	g.writes += w.Writes
	_, err = g.state(ctx)
	return w.Rate, err
}

// state is what DRBD says of itself, which must be that it mirrors.
func (g *guest) state(ctx context.Context) (string, error) {
	state, err := g.run(ctx, "cat /proc/drbd")
	if err == nil && !drbdState.MatchString(state) {
		err = fmt.Errorf("DRBD is not in sync with protocol C:\n%s", state)
	}
	return state, err
}

var (
	drbdState   = regexp.MustCompile(`(?m)^ 0: cs:Connected ro:Primary/Secondary ds:UpToDate/UpToDate C `)
	drbdWritten = regexp.MustCompile(`dw:(\d+)`)
)

// verify asks DRBD what it did, then takes it down and compares both NVDIMMs.
func (g *guest) verify(ctx context.Context) (string, error) {
	state, err := g.state(ctx)
	if err != nil {
		return "", err
	}
	written := drbdWritten.FindAllStringSubmatch(state, -1) // KiB, of each end
	if len(written) != 2 {
		return "", fmt.Errorf("DRBD has not two ends:\n%s", state)
	}
	for i, w := range written {
		if kib, err := strconv.ParseInt(w[1], 10, 64); err != nil || kib*1024 < g.writes*guestBlock {
			return "", fmt.Errorf("DRBD's minor %d wrote %s KiB in %d writes of %d", i, w[1], g.writes, guestBlock)
		}
	}
	if _, err := g.run(ctx, fmt.Sprintf("%s down end0 && %s down end1", g.setup, g.setup)); err != nil {
		return "", err
	}
	out, err := g.run(ctx, fmt.Sprintf("%s compare /dev/pmem0 /dev/pmem1 %d", g.tools.diskload, guestSpan))
	if err != nil {
		return "", err
	}
	var c struct{ Written int64 }
	if err := json.Unmarshal([]byte(out), &c); err != nil || c.Written == 0 {
		return "", fmt.Errorf("diskload found nothing written: %q, %v", out, err)
	}
	return fmt.Sprintf("connected, UpToDate/UpToDate, protocol C, %d writes, as many written by the second end, both NVDIMMs identical (%d blocks written to); the pair on ext4 with MAP_SYNC",
		g.writes, c.Written), nil
}

// run runs a command that has to succeed in the guest.
func (g *guest) run(ctx context.Context, command string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	var out strings.Builder
	status, err := g.Run(ctx, command, func(line string) { fmt.Fprintln(&out, line) })
	if err == nil && status != 0 {
		err = fmt.Errorf("in the guest: %s: status %d\n%s", command, status, &out)
	}
	return out.String(), err
}
