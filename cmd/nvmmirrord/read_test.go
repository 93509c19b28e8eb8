package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/nvmmirror/nvmmirror"
)

// What precedes a damaged block is printed; with --skip-damaged what follows
// it is, too.
func TestReadDamaged(t *testing.T) {
	t.Parallel()
	n := newNode(t, directory(t), "a", "", "")
	var i nvmmirror.Inspection
	if err := json.Unmarshal([]byte(must(t, "info", "-o", "json", n.region)), &i); err != nil {
		t.Fatal(err)
	}
	n.start()
	data := random(t, 5*4096)
	if r := n.write(0, data); r.code != exitDone {
		t.Fatalf("%+v", r)
	}
	f, err := os.OpenFile(n.region, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, block := range []int64{1, 3} {
		if _, err := f.WriteAt([]byte{^data[block*4096+17]}, i.Data.Offset+block*4096+17); err != nil {
			t.Fatal(err)
		}
	}
	read := func(args ...string) result {
		return command(t, nil, n.args(append([]string{"read"}, args...)...)...)
	}
	r := read("--offset", "0", "--length", "8192")
	check(t, r, exitDamage, nil, "block 1 (bytes 4096 to 8192): corrupt", "--skip-damaged")
	if r.stdout != string(data[:4096]) {
		t.Errorf("%d bytes before the damaged block", len(r.stdout))
	}
	// From within a block to within another.
	want := bytes.Clone(data[100:20000])
	for _, block := range []int{1, 3} {
		clear(want[block*4096-100:][:4096])
	}
	r = read("--offset", "100", "--length", "19900", "--skip-damaged")
	check(t, r, exitDamage, nil, "2 damaged blocks")
	if r.stdout != string(want) {
		t.Errorf("%d bytes, which are not those of the volume with zeros for two blocks", len(r.stdout))
	}
	for _, block := range []string{"bytes 4096 to 8192", "bytes 12288 to 16384"} {
		if !strings.Contains(r.stderr, "zeros for "+block) {
			t.Errorf("no %s in %q", block, r.stderr)
		}
	}
	if r := read("--offset", "4197", "--length", "3", "--skip-damaged"); r.code != exitDamage || r.stdout != "\x00\x00\x00" || !strings.Contains(r.stderr, "zeros for bytes 4197 to 4200") {
		t.Errorf("%+v", r)
	}
	if r := read("--offset", "8192", "--length", "4096", "--skip-damaged"); r.code != exitDone || r.stdout != string(data[8192:12288]) || r.stderr != "" {
		t.Errorf("a sound block: exit %d, %d bytes, %q", r.code, len(r.stdout), r.stderr)
	}

	// A page that cannot be read is damage too.
	if err := f.Truncate(i.Length - 4096); err != nil {
		t.Fatal(err)
	}
	r = read("--offset", fmt.Sprint(regionSize-4096), "--length", "4096", "--skip-damaged")
	if r.code != exitDamage || r.stdout != strings.Repeat("\x00", 4096) {
		t.Errorf("exit %d, %d bytes, %q", r.code, len(r.stdout), r.stderr)
	}
}
