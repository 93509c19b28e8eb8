package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// measurePmem runs hack/pmembench: what persists, and what appends, without a
// mirror.
func measurePmem(ctx context.Context, root string, rounds int) ([]row, error) {
	if _, err := program("gcc", "gcc"); err != nil {
		return nil, err
	}
	for _, header := range []string{"libpmem", "libpmemlog"} {
		if _, err := os.Stat("/usr/include/" + header + ".h"); err != nil {
			return nil, &missingError{"no " + header + ".h", header + "-dev"}
		}
	}
	out, err := run(ctx, nil, filepath.Join(root, "hack/pmembench/run.sh"), fmt.Sprint(rounds), "0.1")
	if err != nil {
		return nil, err
	}
	return readPmem(out)
}

// readPmem reads pmembench's two tables: a heading, and a line for each size
// that begins with size, and the medians for C and for Go, in ns.
func readPmem(out string) ([]row, error) {
	kinds := map[string]row{
		"persist": {peer: "libpmem", work: "persist", unit: "ns", target: 1},
		"append":  {peer: "libpmemlog", work: "append, one fence", unit: "ns", target: 0.5},
	}
	var rows []row
	var of row
	for lines := bufio.NewScanner(strings.NewReader(out)); lines.Scan(); {
		if heading, ok := kinds[strings.SplitN(lines.Text(), " ", 2)[0]]; ok {
			of = heading
			continue
		}
		r := of
		var n int
		if _, err := fmt.Sscan(lines.Text(), &n, &r.theirs, &r.ours); err != nil || of.peer == "" || r.theirs <= 0 || r.ours <= 0 {
			return nil, fmt.Errorf("hack/pmembench printed the line %q, %v", lines.Text(), err)
		}
		r.work += ", " + bytesOf(n)
		rows = append(rows, r)
	}
	if len(rows) == 0 {
		return nil, fmt.Errorf("hack/pmembench printed no table: %q", out)
	}
	return rows, nil
}

func bytesOf(n int) string {
	switch {
	case n >= 1<<20:
		return fmt.Sprintf("%d MiB", n>>20)
	case n >= 1<<10:
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d B", n)
}
