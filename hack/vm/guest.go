package vm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Memory is an NVDIMM's content. It lives as long as this process, and has no
// name in any file system: nothing is ever left behind.
type Memory struct{ file *os.File }

const (
	// labelSize is that of the area in which an NVDIMM keeps what namespaces
	// it has. What is left of its size must be a multiple of 16 MiB.
	labelSize = 16 << 20
	// MemorySize is the size of an NVDIMM without its labels; XFS wants more
	// than 300 MiB.
	MemorySize = 512 << 20
)

// NewMemory makes an NVDIMM that nothing has been written to.
func NewMemory() (*Memory, error) {
	fd, err := unix.MemfdCreate("nvdimm", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("vm: memfd_create: %w", err)
	}
	m := &Memory{os.NewFile(uintptr(fd), "nvdimm")}
	if err := m.file.Truncate(MemorySize + labelSize); err != nil {
		return nil, errors.Join(fmt.Errorf("vm: %w", err), m.Close())
	}
	return m, nil
}

// Close gives the memory back. No guest may be using it.
func (m *Memory) Close() error { return m.file.Close() }

// Guest is a booted machine. It is for one goroutine, except for Kill.
type Guest struct {
	cmd     *exec.Cmd
	in      io.WriteCloser
	lines   chan string // what the serial line says; closed at its end
	ended   chan struct{}
	console *os.File
}

// Boot boots a guest with the given NVDIMMs and returns when it takes commands.
// Close must follow. The guest dies with this process.
func Boot(ctx context.Context, k *Kernel, memory []*Memory) (*Guest, error) {
	image, err := k.initramfs()
	if err != nil {
		return nil, err
	}
	g := &Guest{lines: make(chan string, 4096), ended: make(chan struct{})}
	initramfs, err := anonymous("initramfs")
	if err != nil {
		return nil, err
	}
	defer initramfs.Close()
	if _, err := initramfs.Write(image); err != nil {
		return nil, fmt.Errorf("vm: %w", err)
	}
	if g.console, err = anonymous("console"); err != nil {
		return nil, err
	}
	if _, err := unix.FcntlInt(g.console.Fd(), unix.F_SETFL, unix.O_APPEND); err != nil {
		return nil, errors.Join(fmt.Errorf("vm: %w", err), g.console.Close())
	}
	// no_timer_check: a kernel that gets no tick from the 8254 within some ms panics,
	// and QEMU's thread that gives them may not run for so long on a busy machine.
	// Not tsc=reliable, though the kernel then asks an emulated HPET for each time of
	// day: it lets the kernel rewrite sched_clock_tick while both processors run it,
	// and QEMU 7.2 may go on with the int3 that stands there meanwhile, for ever
	// (one boot of 45 on a busy machine).
	// cryptomgr.notests: the self-tests of the kernel's crypto once hung a boot in the
	// same way, one of several hundred.
	// Inherited files begin at descriptor 3; QEMU opens each by its path anew.
	files := []*os.File{initramfs, g.console}
	args := []string{
		"-M", "q35,nvdimm=on,nvdimm-persistence=mem-ctrl", "-accel", "tcg,thread=multi", "-cpu", "max",
		"-smp", "2", "-m", "2G,slots=4,maxmem=12G",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-kernel", k.image, "-initrd", "/dev/fd/3",
		"-append", "console=ttyS0 quiet panic=-1 mitigations=off random.trust_cpu=on no_timer_check cryptomgr.notests",
		"-chardev", "file,id=console,path=/dev/fd/4,append=on",
		"-serial", "chardev:console", "-serial", "stdio",
		"-fsdev", "local,id=root,path=/,readonly=on,security_model=none,multidevs=remap",
		"-device", "virtio-9p-pci,fsdev=root,mount_tag=root",
	}
	for i, m := range memory {
		files = append(files, m.file)
		args = append(args,
			"-object", fmt.Sprintf("memory-backend-file,id=m%d,share=on,mem-path=/dev/fd/%d,size=%d", i, 2+len(files), MemorySize+labelSize),
			"-device", fmt.Sprintf("nvdimm,id=n%d,memdev=m%d,label-size=%d", i, i, labelSize))
	}
	g.cmd = exec.Command(k.qemu, args...)
	g.cmd.ExtraFiles = files
	g.cmd.Stderr = g.console
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if g.in, err = g.cmd.StdinPipe(); err != nil {
		return nil, errors.Join(fmt.Errorf("vm: %w", err), g.console.Close())
	}
	out, err := g.cmd.StdoutPipe()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("vm: %w", err), g.console.Close())
	}
	if err := g.start(out); err != nil {
		return nil, errors.Join(fmt.Errorf("vm: %w", err), g.console.Close())
	}
	if err := g.await(ctx); err != nil {
		g.Close()
		return nil, err
	}
	return g, nil
}

// start starts QEMU on a thread that stays until QEMU has ended: when the
// thread of its birth ends, the kernel kills it.
func (g *Guest) start(out io.Reader) error {
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := g.cmd.Start()
		started <- err
		if err != nil {
			return
		}
		// A last line without its end is a part of one: it is dropped.
		r := bufio.NewReader(out)
		for {
			line, err := r.ReadString('\n')
			if err != nil {
				break
			}
			g.lines <- strings.TrimSuffix(line, "\n")
		}
		g.cmd.Wait() // killed: there is no other end
		close(g.lines)
		close(g.ended)
	}()
	return <-started
}

const (
	ready = "@ ready"
	exit  = "@ exit "
)

func (g *Guest) await(ctx context.Context) error {
	for {
		line, err := g.line(ctx)
		if err != nil {
			return fmt.Errorf("vm: boot: %w; its console ends with:\n%s", err, g.Console(2000))
		}
		if line == ready {
			return nil
		}
	}
}

// ErrEnded says that the guest is gone.
var ErrEnded = errors.New("the guest has ended")

func (g *Guest) line(ctx context.Context) (string, error) {
	select {
	case line, ok := <-g.lines:
		if !ok {
			return "", ErrEnded
		}
		return line, nil
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
}

// Run runs a command of the shell, of one line, in the guest, and gives each
// line of its output to each. It returns the command's exit status. An error
// means that the guest cannot take another command.
func (g *Guest) Run(ctx context.Context, command string, each func(line string)) (int, error) {
	if strings.Contains(command, "\n") {
		return 0, fmt.Errorf("vm: command of several lines: %q", command)
	}
	if _, err := io.WriteString(g.in, command+"\n"); err != nil {
		return 0, fmt.Errorf("vm: %q: %w", command, err)
	}
	for {
		line, err := g.line(ctx)
		if err != nil {
			return 0, fmt.Errorf("vm: %q: %w; the console ends with:\n%s", command, err, g.Console(2000))
		}
		var status int
		if n, _ := fmt.Sscanf(line, exit+"%d", &status); n == 1 {
			return status, nil
		}
		if line != "" {
			each(line)
		}
	}
}

// Kill ends the guest at once, as kill -9, at whatever it is. A Run that is at
// work still gives out what the guest had said, and returns ErrEnded.
func (g *Guest) Kill() { g.cmd.Process.Kill() }

// Close kills the guest, where that has not happened, and waits for its end.
func (g *Guest) Close() {
	g.Kill()
	for range g.lines {
		continue // said to nobody
	}
	<-g.ended
	g.in.Close()
	g.console.Close()
}

// Console is the end of what the kernel printed, and QEMU.
func (g *Guest) Console(most int64) string {
	size, err := g.console.Seek(0, io.SeekEnd)
	if err != nil {
		return err.Error()
	}
	b := make([]byte, min(size, most))
	n, _ := g.console.ReadAt(b, size-int64(len(b)))
	return string(b[:n])
}

// anonymous is a file without a name.
func anonymous(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("vm: memfd_create: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}
