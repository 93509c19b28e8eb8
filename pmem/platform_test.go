package pmem

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// fakeSysfs makes a tree of files ("-> target" is a symbolic link) the sysfs
// of the test.
func fakeSysfs(t *testing.T, tree map[string]string) string {
	t.Helper()
	root := t.TempDir()
	for name, content := range tree {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		var err error
		if target, link := strings.CutPrefix(content, "-> "); link {
			err = os.Symlink(filepath.Join(root, target), name)
		} else {
			err = os.WriteFile(name, []byte(content), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	old := sysfs
	sysfs = root
	t.Cleanup(func() { sysfs = old })
	return root
}

// blockNumber is the device number of path's filesystem.
func blockNumber(t *testing.T, path string) string {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d:%d", unix.Major(uint64(st.Dev)), unix.Minor(uint64(st.Dev)))
}

// null stands for a devdax device: any character device has a number.
const null, nullNumber = "/dev/null", "1:3"

func TestStrongestClass(t *testing.T) {
	for name, c := range map[string]struct {
		tree map[string]string
		want Class
	}{
		"no regions":    {nil, Cacheline},
		"eADR":          {map[string]string{"region0/persistence_domain": "cpu_cache\n", "region1/persistence_domain": "cpu_cache\n", "nmem0/x": ""}, Byte},
		"ADR":           {map[string]string{"region0/persistence_domain": "memory_controller\n"}, Cacheline},
		"mixed":         {map[string]string{"region0/persistence_domain": "cpu_cache\n", "region1/persistence_domain": "memory_controller\n"}, Cacheline},
		"not said":      {map[string]string{"region0/persistence_domain": "cpu_cache\n", "region1/size": "1\n"}, Cacheline},
		"not said well": {map[string]string{"region0/persistence_domain": "\n"}, Cacheline},
	} {
		t.Run(name, func(t *testing.T) {
			tree := map[string]string{}
			for k, v := range c.tree {
				tree["bus/nd/devices/"+k] = v
			}
			fakeSysfs(t, tree)
			if got, why := strongest(); got != c.want || got == Byte != (why == "") {
				t.Errorf("%v (%s), want %v", got, why, c.want)
			}
		})
	}
}

func TestDeviceSize(t *testing.T) {
	info, err := os.Stat(null)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		subsystem, size string
		want            int64
	}{
		"devdax":       {"bus/dax", "536870912\n", 512 << 20},
		"another kind": {"class/mem", "1\n", 0},
		"size garbage": {"bus/dax", "many\n", 0},
		"size 0":       {"bus/dax", "0\n", 0},
	} {
		t.Run(name, func(t *testing.T) {
			fakeSysfs(t, map[string]string{
				c.subsystem + "/x":                      "",
				"dev/char/" + nullNumber + "/subsystem": "-> " + c.subsystem,
				"dev/char/" + nullNumber + "/size":      c.size,
			})
			got, err := deviceSize(null, info)
			if got != c.want || (err == nil) != (c.want > 0) {
				t.Errorf("%d, %v", got, err)
			}
		})
	}
}

func TestShutdownCount(t *testing.T) {
	const bus = "devices/ndbus0/"
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	number := blockNumber(t, file)
	region := map[string]string{
		bus + "region0/mappings":                              "2\n",
		bus + "region0/mapping0":                              "nmem0,0,536870912,0\n",
		bus + "region0/mapping1":                              "nmem1,0,536870912,1\n",
		bus + "region1/mappings":                              "1\n",
		bus + "region1/mapping0":                              "nmem1,536870912,536870912,0\n",
		bus + "region0/namespace0.0/block/pmem0/pmem0p1/size": "1\n",
		bus + "region1/dax1.0/dax1.0/size":                    "1\n",
		"bus/nd/devices/nmem0/nfit/dirty_shutdown":            "3\n",
		"bus/nd/devices/nmem1/papr/dirty_shutdown":            "0x10\n",
		"devices/virtual/block/dm-0/slaves/pmem0":             "-> " + bus + "region0/namespace0.0/block/pmem0",
		"devices/virtual/block/dm-0/slaves/dax":               "-> " + bus + "region1/dax1.0/dax1.0",
		"devices/virtual/block/dm-1/slaves/pmem0":             "-> " + bus + "region0/namespace0.0/block/pmem0",
		"devices/virtual/block/dm-1/slaves/sda":               "-> devices/pci/sda",
		"devices/pci/sda/size":                                "1\n",
	}
	for name, c := range map[string]struct {
		path, link, target string
		without            string // a file left out
		with               [2]string
		count              uint64
		ok, fails          bool
	}{
		"fsdax":              {path: file, link: "block/" + number, target: bus + "region0/namespace0.0/block/pmem0", count: 19, ok: true},
		"partition":          {path: file, link: "block/" + number, target: bus + "region0/namespace0.0/block/pmem0/pmem0p1", count: 19, ok: true},
		"devdax":             {path: null, link: "char/" + nullNumber, target: bus + "region1/dax1.0/dax1.0", count: 16, ok: true},
		"LVM over both":      {path: file, link: "block/" + number, target: "devices/virtual/block/dm-0", count: 19, ok: true},
		"LVM in part on ssd": {path: file, link: "block/" + number, target: "devices/virtual/block/dm-1"},
		"not pmem":           {path: file, link: "block/" + number, target: "devices/pci/sda"},
		"no device":          {path: file, link: "block/0:0", target: "devices/pci/sda"},
		"not counted":        {path: file, link: "block/" + number, target: bus + "region0/namespace0.0/block/pmem0", without: "bus/nd/devices/nmem0/nfit/dirty_shutdown"},
		"no modules":         {path: file, link: "block/" + number, target: bus + "region0/namespace0.0/block/pmem0", without: bus + "region0/mappings"},
		"module missing":     {path: file, link: "block/" + number, target: bus + "region0/namespace0.0/block/pmem0", without: bus + "region0/mapping1", fails: true},
		"mapping garbage":    {path: file, link: "block/" + number, target: bus + "region0/namespace0.0/block/pmem0", with: [2]string{bus + "region0/mapping1", "../etc,1"}, fails: true},
		"count garbage":      {path: file, link: "block/" + number, target: bus + "region0/namespace0.0/block/pmem0", with: [2]string{"bus/nd/devices/nmem0/nfit/dirty_shutdown", "x"}, fails: true},
		"no file":            {path: file + "x", link: "block/" + number, target: "devices/pci/sda", fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			tree := map[string]string{"dev/" + c.link: "-> " + c.target}
			for k, v := range region {
				if k != c.without {
					tree[k] = v
				}
			}
			if c.with[0] != "" {
				tree[c.with[0]] = c.with[1]
			}
			fakeSysfs(t, tree)
			count, ok, err := ShutdownCount(c.path)
			if count != c.count || ok != c.ok || (err != nil) != c.fails {
				t.Errorf("%d, %v, %v", count, ok, err)
			}
		})
	}
}

func TestDeepFlushOfADevice(t *testing.T) {
	for flag, want := range map[string]string{"1\n": "1", "0\n": "0\n", "": ""} {
		root := fakeSysfs(t, map[string]string{
			"devices/ndbus0/region7/dax7.0/dax7.0/size": "1\n",
			"dev/char/" + nullNumber:                    "-> devices/ndbus0/region7/dax7.0/dax7.0",
			"devices/ndbus0/region7/deep_flush":         flag,
		})
		name := filepath.Join(root, "devices/ndbus0/region7/deep_flush")
		if flag == "" {
			if err := os.Remove(name); err != nil {
				t.Fatal(err)
			}
		}
		if err := deepFlushDevice(null); err != nil {
			t.Errorf("flag %q: %v", flag, err)
		}
		got, err := os.ReadFile(name)
		if flag != "" && (err != nil || string(got) != want) {
			t.Errorf("flag %q became %q (%v), want %q", flag, got, err, want)
		}
	}
}

func TestDeepFlushOfAFile(t *testing.T) {
	if err := emulated(t, 4096).DeepFlush(); err != nil {
		t.Error(err)
	}
	r := createAt(t, filepath.Join(t.TempDir(), "region"), 1<<20, Emulated)
	if err := r.DeepFlush(); err != nil {
		t.Error(err)
	}
}

func TestBadBlocksOfADevice(t *testing.T) {
	const region = "devices/ndbus0/region7/"
	for name, c := range map[string]struct {
		list  string
		want  []Range
		fails bool
	}{
		"none":    {"", nil, false},
		"inside":  {"8 1\n16 2\n", []Range{{0, 512}, {4096, 1024}}, false},
		"across":  {"0 9\n1000 8\n4095 100\n", []Range{{0, 512}, {507904, 4096}, {2092544, 4608}}, false},
		"outside": {"0 8\n999999 8\n", nil, false},
		"garbage": {"8\n", nil, true},
	} {
		t.Run(name, func(t *testing.T) {
			fakeSysfs(t, map[string]string{
				"dev/char/" + nullNumber:        "-> " + region + "dax7.0/dax7.0",
				region + "badblocks":            c.list,
				region + "resource":             "0x100000000\n",
				region + "dax7.0/dax7.0/size":   "2097152\n",
				region + "dax7.0/resource":      "0x100001000\n",
				region + "dax7.0/dax7.0/target": "0\n",
			})
			got, ok, err := BadBlocks(null)
			if !slices.Equal(got, c.want) || (err != nil) != c.fails || ok == c.fails {
				t.Errorf("%v, %v, %v; want %v", got, ok, err, c.want)
			}
		})
	}
}

// The bad blocks of a disk are found in the file that lies on them, also
// through a partition.
func TestBadBlocksOfAFile(t *testing.T) {
	path := filepath.Join(pagedDir(t), "file")
	if err := os.WriteFile(path, bytes.Repeat([]byte{1}, 64<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	extents, err := extentsOf(f)
	if err != nil || len(extents) == 0 {
		t.Skipf("no extents of %s (%v): the filesystem has no FIEMAP", path, err)
	}
	e := extents[0]
	number := blockNumber(t, path)
	disk := fmt.Sprintf("%d 1\n%d 2\n", e.physical/sector-1, e.physical/sector+4)
	want := []Range{{e.logical + 4*sector, 2 * sector}}
	start := e.physical/sector - 1
	for name, tree := range map[string]map[string]string{
		"disk": {
			"dev/block/" + number:     "-> devices/pmem0",
			"devices/pmem0/badblocks": disk,
		},
		// The partition begins at start, so the same list of the disk must
		// be moved by as much to mean the same file.
		"partition": {
			"dev/block/" + number:         "-> devices/pmem0/pmem0p1",
			"devices/pmem0/pmem0p1/start": fmt.Sprintln(start),
			"devices/pmem0/pmem0p1/size":  fmt.Sprintln(int64(1) << 40),
			"devices/pmem0/badblocks":     fmt.Sprintf("%d 2\n", start+e.physical/sector+4),
		},
	} {
		t.Run(name, func(t *testing.T) {
			fakeSysfs(t, tree)
			got, ok, err := BadBlocks(path)
			if err != nil || !ok || !slices.Equal(got, want) {
				t.Errorf("%v, %v, %v; want %v (extents %v)", got, ok, err, want, extents)
			}
		})
	}
	fakeSysfs(t, map[string]string{"dev/block/" + number: "-> devices/sda", "devices/sda/x": ""})
	if got, ok, err := BadBlocks(path); ok || err != nil || got != nil {
		t.Errorf("without a list: %v, %v, %v", got, ok, err)
	}
}

// A devdax device is persistent where it belongs to an NVDIMM region, and its
// flushes reach that.
func TestClassOfADevice(t *testing.T) {
	if !hasFlush() {
		t.Skip("this CPU has no instruction that flushes to persistence")
	}
	for name, c := range map[string]struct {
		target string
		with   [2]string
		class  Class
	}{
		"NVDIMM":      {target: "devices/ndbus0/region0/dax0.1/dax0.0", class: Cacheline},
		"eADR":        {target: "devices/ndbus0/region0/dax0.1/dax0.0", with: [2]string{"bus/nd/devices/region0/persistence_domain", "cpu_cache\n"}, class: Byte},
		"dax_hmem":    {target: "devices/platform/hmem.0/dax0.0", class: Emulated},
		"CXL RAM":     {target: "devices/platform/cxl/region0/dax_region0/dax0.0", class: Emulated},
		"virtio-pmem": {target: "devices/ndbus0/region0/dax0.1/dax0.0", with: [2]string{"devices/ndbus0/provider", "virtio-pmem\n"}, class: Emulated},
	} {
		tree := map[string]string{
			c.target + "/size":        "4194304\n",
			c.target + "/subsystem":   "-> bus/dax",
			"bus/dax/x":               "",
			"dev/char/" + nullNumber:  "-> " + c.target,
			"devices/ndbus0/provider": "ACPI.NFIT\n",
		}
		if c.with[0] != "" {
			tree[c.with[0]] = c.with[1]
		}
		fakeSysfs(t, tree)
		f, err := os.Open(null)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if found, err := classify(f, 0); err != nil || found.class != c.class || !found.device {
			t.Errorf("%s: %+v, %v; want %v", name, found, err, c.class)
		}
	}
}
