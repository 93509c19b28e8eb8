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

// quietBoot is what a boot takes on two quiet CPUs, two at once. How much longer
// it takes here says how much longer to wait for everything else.
const quietBoot = 10 * time.Second

// A guest's tests are taken to be guestSlow times slower than the host's on a
// quiet machine, and on a loaded one no more than slowest times: peers that take
// longer than that to miss each other only make them longer.
const guestSlow, slowest = 2, 5

// bootTime bounds a boot, of which nothing is known yet, and suiteTime a suite:
// what hangs ends, and what is slow goes on.
const bootTime, suiteTime = 5 * time.Minute, 5 * time.Minute

// TestDAX runs what needs real DAX in guests that have it: the test binaries
// of pmem, journal and the volume, and a load under which the guest is killed.
// Two guests at once fill two CPUs.
func TestDAX(t *testing.T) {
	k := needGuests(t, "make test-dax")
	t.Logf("kernel %s", k.Release())
	bin := buildTools(t)
	var suites, kills strings.Builder // failures, once more at the end, where a log that is cut still has them
	t.Run("guests", func(t *testing.T) {
		t.Run("suites", func(t *testing.T) {
			t.Parallel()
			testSuites(t, k, bin, &suites)
		})
		t.Run("kills", func(t *testing.T) {
			t.Parallel()
			testKills(t, k, bin, &kills)
		})
	})
	if failures := suites.String() + kills.String(); failures != "" {
		t.Logf("failed in the guest:\n%s", failures)
	}
}

// needGuests is the guests' kernel; the test skips where there is none, or
// where the make target that is to run it was not asked for.
func needGuests(t *testing.T, target string) *Kernel {
	t.Helper()
	if os.Getenv(enableEnv) == "" {
		t.Skipf("boots guests, which takes minutes: set %s, or %s", enableEnv, target)
	}
	k, err := FindKernel()
	if errors.Is(err, ErrMissing) {
		t.Skip(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	return k
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
		{"test", "-c", "-o", dir + "/", "./pmem", "./journal", "./internal/bench", "."},
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
	slow   float64       // how many times longer than quietBoot the slowest took
	*Guest
	failures *strings.Builder // what led to failures
}

// fatalf ends the test.
func (m *machine) fatalf(format string, args ...any) {
	m.t.Helper()
	fmt.Fprintf(m.failures, format+"\n", args...)
	m.t.Fatalf(format, args...)
}

// within is a deadline for what takes up to d on a quiet machine.
func (m *machine) within(d time.Duration) time.Duration {
	return time.Duration(float64(d) * max(1, m.slow))
}

func newMachine(t *testing.T, k *Kernel, failures *strings.Builder) *machine {
	t.Helper()
	m := &machine{t: t, k: k, failures: failures}
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
	ctx, cancel := context.WithTimeout(m.t.Context(), bootTime)
	defer cancel()
	start := time.Now()
	g, err := Boot(ctx, m.k, m.memory)
	if err != nil {
		m.fatalf("%v", err)
	}
	m.Guest, m.took = g, time.Since(start)
	m.slow = max(m.slow, float64(m.took)/float64(quietBoot))
}

// mount finds what the namespaces hold, which the order of their discovery
// does not say.
func (m *machine) mount() {
	m.t.Helper()
	m.must("for d in /dev/pmem?; do f=$(blkid -o value -s TYPE $d) && mkdir -p /mnt/$f && mount -o dax=always $d /mnt/$f || exit; done")
	m.device = strings.TrimSpace(m.must("ls /dev/dax*"))
	mounts := m.must("grep dax=always /proc/mounts")
	if strings.Count(mounts, "\n") != 2 || !strings.Contains(mounts, "/mnt/ext4 ext4") || !strings.Contains(mounts, "/mnt/xfs xfs") || strings.Contains(m.device, "\n") {
		m.fatalf("not mounted, or no device:\n%s%s", mounts, m.device)
	}
}

// must runs a command that has to succeed, and returns its output.
func (m *machine) must(command string) string {
	m.t.Helper()
	limit := m.within(time.Minute)
	ctx, cancel := context.WithTimeoutCause(m.t.Context(), limit, fmt.Errorf("not done within %v", limit))
	defer cancel()
	var out strings.Builder
	status, err := m.Run(ctx, command, func(line string) { fmt.Fprintln(&out, line) })
	if err != nil || status != 0 {
		m.fatalf("%s: status %d, %v\n%s", command, status, err, &out)
	}
	return out.String()
}

// suite runs a test binary in the guest, verbosely, as a subtest. The binary
// ends itself at its limit, and says what it was at.
func (m *machine) suite(name, command string) {
	m.t.Helper()
	m.t.Run(name, func(t *testing.T) {
		start := time.Now()
		limit := m.within(suiteTime)
		ctx, cancel := context.WithTimeoutCause(t.Context(), limit+m.within(10*time.Second), fmt.Errorf("not done within %v", limit))
		defer cancel()
		var said, failed strings.Builder // since the last test; of those that failed
		defer func() {
			if t.Failed() {
				fmt.Fprintf(m.failures, "%s:\n%s", name, &failed)
			}
		}()
		passed, skipped := 0, 0
		status, err := m.Run(ctx, fmt.Sprintf("%s -test.v -test.short -test.timeout %v", command, limit), func(line string) {
			word := strings.TrimSpace(line)
			top := word == line
			if !strings.HasPrefix(word, "=== ") {
				fmt.Fprintln(&said, line)
			}
			switch {
			case strings.HasPrefix(word, "--- PASS"):
				passed++
				if !top {
					return
				}
				said.Reset() // what led to a success is of no interest
			case strings.HasPrefix(word, "--- SKIP"):
				skipped++
			case strings.HasPrefix(word, "--- FAIL"):
				failed.WriteString(said.String())
				said.Reset()
			default:
				return
			}
			t.Log(line)
		})
		failed.WriteString(said.String())
		if err != nil {
			t.Fatalf("%v\n%s", err, &failed)
		}
		if status != 0 || passed == 0 {
			t.Fatalf("status %d:\n%s", status, &failed)
		}
		t.Logf("%d passed, %d skipped in the guest, %v", passed, skipped, time.Since(start).Round(time.Millisecond))
	})
}

// testSuites runs the test binaries. What these tests put into /dev/shm is on
// DAX too for the pair: it is mounted there.
func testSuites(t *testing.T, k *Kernel, bin string, failures *strings.Builder) {
	root, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	m := newMachine(t, k, failures)
	t.Logf("first boot and file systems: %v", time.Since(start).Round(time.Millisecond))
	// The guest's root, an overlay, has no unnamed files; temporary ones go to
	// tmpfs, where the tests of class paged skip: they run on the host.
	env := "TMPDIR=/run NVMMIRROR_DAX_DIR=/mnt/ext4:/mnt/xfs NVMMIRROR_DEVDAX=" + m.device + " "
	env += fmt.Sprintf("NVMMIRROR_TEST_SLOW=%.1f ", min(slowest, guestSlow*max(1, m.slow)))
	run := func(name, pkg, env, pattern string) {
		binary := pkg
		if pkg == "." {
			binary = "nvmmirror"
		}
		m.suite(name, fmt.Sprintf("cd %s && %s %s/%s.test -test.run '%s'",
			filepath.Join(root, pkg), env, bin, filepath.Base(binary), pattern))
	}
	run("pmem", "pmem", env, ".")
	run("journal", "journal", env, ".")
	run("kernel-crypto", "internal/bench", env, "^TestALG$")
	run("volume", ".", env+"NVMMIRROR_CLOCK_STEP=1 ", "^(TestDAX|TestUnreadable)")
	for _, fs := range []string{"ext4", "xfs"} {
		m.must(fmt.Sprintf("mkdir /mnt/%s/shm && mount --bind /mnt/%s/shm /dev/shm", fs, fs))
		run("pair-"+fs, ".", env, "^("+strings.Join(pairTests[fs], "|")+")$")
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
