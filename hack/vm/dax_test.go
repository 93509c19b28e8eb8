package vm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// enableEnv makes the tests boot guests, which takes minutes.
const enableEnv = "NVMMIRROR_VM"

// daxBoot is how long a guest may take to boot: 4 to 6 s on a quiet machine.
const daxBoot = 2 * time.Minute

// TestDAX runs what needs real DAX in guests that have it: the test binaries
// of pmem, journal and the volume, and a load under which the guest is killed.
// Two guests at once fill two CPUs.
func TestDAX(t *testing.T) {
	if os.Getenv(enableEnv) == "" {
		t.Skipf("boots guests, which takes minutes: set %s, or make test-dax", enableEnv)
	}
	k, err := FindKernel()
	if errors.Is(err, ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("kernel %s", k.Release())
	bin := buildTools(t)
	t.Run("guests", func(t *testing.T) {
		t.Run("suites", func(t *testing.T) {
			t.Parallel()
			testSuites(t, k, bin)
		})
		t.Run("kills", func(t *testing.T) {
			t.Parallel()
			testKills(t, k, bin)
		})
	})
}

// buildTools builds what runs in the guest.
func buildTools(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"test", "-c", "-o", dir + "/", "./pmem", "./journal", "."},
		{"build", "-buildvcs=false", "-o", dir + "/", "./cmd/nvmmirrord", "./hack/vm/load"},
	} {
		cmd := exec.Command("go", args...)
		cmd.Dir = root
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
	return dir
}

// machine is a guest and the NVDIMMs that outlive it: one with ext4, one with
// XFS, one as a device.
type machine struct {
	t      *testing.T
	k      *Kernel
	memory []*Memory
	device string        // the path of the devdax device
	took   time.Duration // the last boot
	*Guest
}

func newMachine(t *testing.T, k *Kernel) *machine {
	t.Helper()
	m := &machine{t: t, k: k}
	for range 3 {
		nvdimm, err := NewMemory()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { nvdimm.Close() })
		m.memory = append(m.memory, nvdimm)
	}
	t.Cleanup(func() { // before the memory goes
		if m.Guest != nil {
			m.Close()
		}
	})
	m.boot()
	for i, mode := range []string{"fsdax", "fsdax", "devdax"} {
		m.must(fmt.Sprintf("ndctl create-namespace -f -e namespace%d.0 -m %s -M mem", i, mode))
	}
	m.must("mkfs.ext4 -q -b 4096 /dev/pmem0 && mkfs.xfs -q /dev/pmem1")
	m.mount()
	return m
}

// boot boots it, as if for the first time.
func (m *machine) boot() {
	m.t.Helper()
	if m.Guest != nil {
		m.Close()
		m.Guest = nil
	}
	ctx, cancel := context.WithTimeout(m.t.Context(), daxBoot)
	defer cancel()
	start := time.Now()
	g, err := Boot(ctx, m.k, m.memory)
	if err != nil {
		m.t.Fatal(err)
	}
	m.Guest, m.took = g, time.Since(start)
}

// mount finds what the namespaces hold, which the order of their discovery
// does not say.
func (m *machine) mount() {
	m.t.Helper()
	m.must("for d in /dev/pmem?; do f=$(blkid -o value -s TYPE $d) && mkdir -p /mnt/$f && mount -o dax=always $d /mnt/$f || exit; done")
	m.device = strings.TrimSpace(m.must("ls /dev/dax*"))
	mounts := m.must("grep dax=always /proc/mounts")
	if strings.Count(mounts, "\n") != 2 || !strings.Contains(mounts, "/mnt/ext4 ext4") || !strings.Contains(mounts, "/mnt/xfs xfs") || strings.Contains(m.device, "\n") {
		m.t.Fatalf("not mounted, or no device:\n%s%s", mounts, m.device)
	}
}

// must runs a command that has to succeed, and returns its output.
func (m *machine) must(command string) string {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), 2*time.Minute)
	defer cancel()
	var out strings.Builder
	status, err := m.Run(ctx, command, func(line string) { fmt.Fprintln(&out, line) })
	if err != nil || status != 0 {
		m.t.Fatalf("%s: status %d, %v\n%s", command, status, err, &out)
	}
	return out.String()
}

// suite runs a test binary in the guest, verbosely, as a subtest.
func (m *machine) suite(name, command string) {
	m.t.Helper()
	m.t.Run(name, func(t *testing.T) {
		start := time.Now()
		ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
		defer cancel()
		var failure strings.Builder
		passed, skipped := 0, 0
		status, err := m.Run(ctx, command, func(line string) {
			word := strings.TrimSpace(line)
			if word != line || !strings.HasPrefix(line, "--- PASS") {
				fmt.Fprintln(&failure, line)
			} else {
				failure.Reset() // what led to a success is of no interest
			}
			switch {
			case strings.HasPrefix(word, "--- PASS"):
				passed++
			case strings.HasPrefix(word, "--- SKIP"):
				skipped++
			case strings.HasPrefix(word, "--- FAIL"):
			default:
				return
			}
			t.Log(line)
		})
		if err != nil {
			t.Fatal(err)
		}
		if status != 0 || passed == 0 {
			t.Fatalf("status %d:\n%s", status, &failure)
		}
		t.Logf("%d passed, %d skipped in the guest, %v", passed, skipped, time.Since(start).Round(time.Millisecond))
	})
}

// testSuites runs the test binaries. What these tests put into /dev/shm is on
// DAX too for the pair: it is mounted there.
func testSuites(t *testing.T, k *Kernel, bin string) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	m := newMachine(t, k)
	t.Logf("first boot and file systems: %v", time.Since(start).Round(time.Millisecond))
	// The guest's root, an overlay, has no unnamed files; temporary ones go to
	// tmpfs, where the tests of class paged skip: they run on the host.
	env := "TMPDIR=/run NVMMIRROR_DAX_DIR=/mnt/ext4:/mnt/xfs NVMMIRROR_DEVDAX=" + m.device + " "
	run := func(name, pkg, env, pattern string) {
		binary := pkg
		if pkg == "." {
			binary = "nvmmirror"
		}
		m.suite(name, fmt.Sprintf("cd %s && %s %s/%s.test -test.v -test.short -test.run '%s'",
			filepath.Join(root, pkg), env, bin, filepath.Base(binary), pattern))
	}
	run("pmem", "pmem", env, ".")
	run("journal", "journal", env, ".")
	run("volume", ".", env+"NVMMIRROR_CLOCK_STEP=1 ", "^TestDAX")
	for _, fs := range []string{"ext4", "xfs"} {
		m.must(fmt.Sprintf("mkdir /mnt/%s/shm && mount --bind /mnt/%s/shm /dev/shm", fs, fs))
		run("pair-"+fs, ".", "", "^("+strings.Join(pairTests[fs], "|")+")$")
		m.must("umount /dev/shm")
	}
	// Last: the bad block stays.
	run("badblock", "pmem", env+"NVMMIRROR_DAX_BADBLOCK=1 ", "^TestDAXBadBlock$")
}

// pairTests are those of the pair that do not measure time closely, which an
// emulated machine cannot keep, by the file system that they run on.
var pairTests = map[string][]string{
	"ext4": {"TestBothKilled", "TestGoingAlone", "TestAbsence", "TestDropTail", "TestDamagedSecondary", "TestFlippedBlockOnThePrimary"},
	"xfs":  {"TestPrimaryRestartUnderLoad", "TestFullCopyUnderLoad", "TestSwitchOver", "TestTitleGoesWithThePromotion"},
}
