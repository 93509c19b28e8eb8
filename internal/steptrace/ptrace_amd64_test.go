package steptrace

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"runtime"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// tracer runs a child and single-steps the thread that says markOn, until it
// says markOff. The child's other threads stand still meanwhile: with
// GOMAXPROCS=1 and a monitor that does not run, the Go scheduler has no reason
// to use another thread. All methods run on one operating system thread.
type tracer struct {
	trace  *trace
	pid    int
	worker int
	others map[int]*thread
	regs   unix.PtraceRegs
	code   map[uint64]*inst
	region region

	killAfter int  // operations on the region; 0: not
	killFence bool // before the next fence
	kill      bool // it was killed
	group     bool // goroutines give way at fences
	over      bool // the child has ended
	wstatus   unix.WaitStatus
}

// thread is a thread of the child that is not stepped.
type thread struct {
	stopped bool
	signal  int // to be delivered when it goes on
}

// errForbidden: this system does not let a process trace its child.
var errForbidden = errors.New("ptrace is not permitted here")

const childDeadline = 8 * time.Minute

// run traces one child to its end, and adds what it did to tr.
func run(tr *trace, path string, env []string) error {
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and with it
		// whatever is still traced.
		runtime.LockOSThread()
		done <- runLocked(tr, path, env)
	}()
	return <-done
}

func runLocked(tr *trace, path string, env []string) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	if err := pin(); err != nil {
		return err
	}
	p, err := os.StartProcess(exe, []string{exe}, &os.ProcAttr{
		Env:   env,
		Files: []*os.File{nil, os.Stdout, os.Stderr},
		Sys:   &syscall.SysProcAttr{Ptrace: true},
	})
	if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
		return fmt.Errorf("%w: %w", errForbidden, err)
	}
	if err != nil {
		return err
	}
	t := &tracer{trace: tr, pid: p.Pid, others: map[int]*thread{}, code: map[uint64]*inst{}}
	t.region.tr, t.region.path = tr, path
	deadline := time.AfterFunc(childDeadline, func() { p.Kill() })
	defer deadline.Stop()
	err = t.follow()
	if !t.over {
		p.Kill()
		err = errors.Join(err, t.reap())
	}
	p.Release()
	t.region.close()
	if err == nil && !t.kill && !(t.wstatus.Exited() && t.wstatus.ExitStatus() == 0) {
		err = fmt.Errorf("the traced child ended with status %#x (9: it was killed, after %v)", t.wstatus, childDeadline)
	}
	return err
}

// pin keeps this thread, and the child that it starts, on one CPU: changing
// over to a thread on another one takes several times as long.
func pin() error {
	var one unix.CPUSet
	var cpu uint32
	if _, _, e := unix.RawSyscall(unix.SYS_GETCPU, uintptr(unsafe.Pointer(&cpu)), 0, 0); e != 0 {
		return e
	}
	one.Set(int(cpu))
	return unix.SchedSetaffinity(0, &one)
}

// follow runs the child freely, but for its marks.
func (t *tracer) follow() error {
	if _, err := t.wait(t.pid); err != nil {
		return err
	}
	const options = unix.PTRACE_O_TRACESYSGOOD | unix.PTRACE_O_TRACECLONE | unix.PTRACE_O_EXITKILL
	if err := t.ptrace(unix.PTRACE_SETOPTIONS, t.pid, 0, options); err != nil {
		return err
	}
	t.others[t.pid] = &thread{stopped: true}
	for {
		if err := t.resume(unix.PTRACE_SYSCALL); err != nil {
			return err
		}
		tid, err := t.wait(-1)
		if err != nil || t.over {
			return err
		}
		if tid == 0 {
			continue
		}
		if !t.wstatus.Stopped() || t.wstatus.StopSignal() != unix.SIGTRAP|0x80 {
			continue
		}
		m, ok, err := t.markAtEntry(tid)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		if m.kind != markOn {
			t.note(op{kind: opMark, mark: m})
			continue
		}
		t.worker = tid
		t.note(op{kind: opMark, mark: m})
		if err := t.step(); err != nil || t.over || t.kill {
			return err
		}
	}
}

// markAtEntry is the mark that a thread is about to make.
func (t *tracer) markAtEntry(tid int) (m mark, ok bool, err error) {
	var info struct {
		op       uint8
		_        [7]byte
		_, _     uint64
		nr       uint64
		args     [6]uint64
		_        [4]uint64
		reserved uint64
	}
	n, _, e := unix.RawSyscall6(unix.SYS_PTRACE, unix.PTRACE_GET_SYSCALL_INFO, uintptr(tid), unsafe.Sizeof(info), uintptr(unsafe.Pointer(&info)), 0, 0)
	if e == unix.ESRCH { // the process ends, and took the thread with it: wait says so
		return m, false, nil
	}
	if e != 0 {
		return m, false, fmt.Errorf("ptrace: system call of thread %d: %w", tid, e)
	}
	if n < 80 || info.op != unix.PTRACE_SYSCALL_INFO_ENTRY || info.nr != markCall {
		return m, false, nil
	}
	return mark{markKind(info.args[0]), info.args[1], info.args[2]}, true, nil
}

// resume lets all stopped threads go on.
func (t *tracer) resume(how int) error {
	for tid, th := range t.others {
		if !th.stopped {
			continue
		}
		if err := t.ptrace(how, tid, 0, uintptr(th.signal)); err != nil && err != unix.ESRCH {
			return err
		}
		th.stopped, th.signal = false, 0
	}
	return nil
}

// halt stops all threads but the worker.
func (t *tracer) halt() error {
	delete(t.others, t.worker)
	for again := true; again; {
		again = false
		for tid, th := range t.others {
			if th.stopped {
				continue
			}
			if err := unix.Tgkill(t.pid, tid, unix.SIGSTOP); err != nil && err != unix.ESRCH {
				return fmt.Errorf("stopping thread %d: %w", tid, err)
			}
			if _, err := t.wait(tid); err != nil {
				return err
			}
			again = true // it may have started another
			if t.over {
				return nil
			}
		}
	}
	return nil
}

// step single-steps the worker until markOff, or its end.
func (t *tracer) step() error {
	if err := t.halt(); err != nil {
		return err
	}
	for first := true; ; first = false {
		var in *inst
		if !first { // the first is the rest of the system call that was the mark
			var err error
			if in, err = t.fetch(); err != nil {
				return err
			}
			if in.access == accSyscall && t.regs.Rax == markCall {
				stop, err := t.marked(mark{markKind(t.regs.Rdi), t.regs.Rsi, t.regs.Rdx})
				if stop || err != nil {
					return err
				}
			}
		}
		if in != nil && in.access == accFence && t.killFence {
			t.killed()
			return nil
		}
		before := t.regs
		if in != nil && (in.leaf || in.moves != nil && t.elsewhere(in)) {
			if err := t.runLeaf(); err != nil {
				return err
			}
			continue
		}
		if err := t.single(); err != nil || t.over {
			return err
		}
		if in == nil {
			continue
		}
		if err := t.judge(in, &before); err != nil {
			return err
		}
		if t.kill {
			return nil
		}
	}
}

// single makes one step and reads the registers.
func (t *tracer) single() error { return t.move(unix.PTRACE_SINGLESTEP) }

// move lets the worker go on until it traps, and reads the registers.
func (t *tracer) move(how int) error {
	signal := 0
	for {
		t.trace.steps++
		if err := t.ptrace(how, t.worker, 0, uintptr(signal)); err != nil {
			return fmt.Errorf("ptrace: step: %w", err)
		}
		if _, err := t.wait(t.worker); err != nil || t.over {
			return err
		}
		if !t.wstatus.Stopped() {
			return fmt.Errorf("ptrace: the stepped thread ended: status %#x", t.wstatus)
		}
		signal = int(t.wstatus.StopSignal())
		if signal == int(unix.SIGTRAP) && t.wstatus.TrapCause() <= 0 {
			break
		}
		if signal == int(unix.SIGTRAP) || signal == int(unix.SIGSTOP) {
			signal = 0 // a new thread, or our own
		}
	}
	return t.ptrace(unix.PTRACE_GETREGS, t.worker, 0, uintptr(unsafe.Pointer(&t.regs)))
}

// fetch is the instruction that comes next.
func (t *tracer) fetch() (*inst, error) {
	pc := t.regs.Rip
	in := t.code[pc]
	if in == nil {
		var code [16]byte
		local := []unix.Iovec{{Base: &code[0], Len: 16}}
		n, err := unix.ProcessVMReadv(t.pid, local, []unix.RemoteIovec{{Base: uintptr(pc), Len: 16}}, 0)
		if err != nil || n == 0 {
			return nil, fmt.Errorf("reading the code at %#x: %d bytes, %w", pc, n, err)
		}
		in = decode(pc, code[:])
		if f := runtime.FuncForPC(uintptr(pc)); f != nil && uint64(f.Entry()) == pc {
			in.moves = movers[f.Name()]
			if !bytes.HasPrefix(code[:], moverEntry) {
				in.moves = nil
			}
			if in.leaf = leaves[f.Name()]; in.leaf {
				if err := checkLeaf(pc); err != nil {
					return nil, err
				}
			}
		}
		t.code[pc] = in
	}
	if in.access == accUnknown {
		return nil, fmt.Errorf("the instruction % x at %s cannot be decoded: teach decode what it does to memory", in.raw, function(pc))
	}
	return in, nil
}

// judge notes what the instruction did that was just stepped.
func (t *tracer) judge(in *inst, before *unix.PtraceRegs) error {
	r := &t.region
	switch in.access {
	case accNone, accLoad:
		return nil
	case accFence:
		t.note(op{kind: opFence, name: in.name, pc: t.site(before)})
		if t.group {
			if err := t.preempt(); err != nil {
				return err
			}
		}
		return r.compare(before.Rip)
	case accSyscall:
		return r.syscall(t.pid, before, t.regs.Rax)
	case accString:
		// One repetition a step, whatever the processor does at full speed.
		from, to := before.Rdi, t.regs.Rdi
		if to < from {
			return r.outside(in, from, before.Rip)
		}
		if !r.holds(from) || to == from {
			return nil
		}
		return t.stored(opStore, in, from, int(to-from), before.Rip)
	}
	a := in.address(before)
	if !r.holds(a) {
		return nil
	}
	switch in.access {
	case accFlush:
		t.note(op{kind: opFlush, off: r.offset(a) &^ 63, name: in.name, pc: t.site(before)})
	case accStore:
		return t.stored(opStore, in, a, in.size, before.Rip)
	case accNT:
		return t.stored(opNT, in, a, in.size, before.Rip)
	default:
		return fmt.Errorf("%s (% x) at %s names the region: teach decode what it does to memory", in.name, in.raw, function(before.Rip))
	}
	return nil
}

func (t *tracer) stored(kind opKind, in *inst, a uint64, n int, pc uint64) error {
	p, err := t.region.stored(a, n, pc)
	if err != nil {
		return err
	}
	t.note(op{kind: kind, off: t.region.offset(a), data: p, name: in.name, pc: pc})
	return nil
}

// note adds an event, and kills the child where it is its turn.
func (t *tracer) note(o op) {
	t.trace.ops = append(t.trace.ops, o)
	if t.killAfter == 0 || o.kind == opMark {
		return
	}
	if t.killAfter--; t.killAfter == 0 {
		t.killed()
	}
}

func (t *tracer) killed() {
	t.kill = true
	t.trace.ops = append(t.trace.ops, op{kind: opKilled})
}

// marked handles a mark of the worker. stop: it is not stepped any more.
func (t *tracer) marked(m mark) (stop bool, err error) {
	switch m.kind {
	case markOff:
		t.others[t.worker] = &thread{stopped: true}
		t.trace.untraced = true
		t.note(op{kind: opMark, mark: m})
		return true, t.region.compare(t.regs.Rip)
	case markGroup:
		t.group = m.a == 1
	case markKill:
		t.killAfter, t.killFence = int(m.a), m.a == 0
	default:
		t.note(op{kind: opMark, mark: m})
	}
	return false, nil
}

// reap waits until the child is gone.
func (t *tracer) reap() error {
	for !t.over {
		if _, err := t.wait(-1); err != nil {
			return err
		}
	}
	return nil
}

// wait waits for a thread of the child, -1: any. over is set when the child
// has ended.
func (t *tracer) wait(tid int) (int, error) { return t.waitWith(tid, 0) }

func (t *tracer) waitWith(tid, flags int) (int, error) {
	// Raw: the Go scheduler is not told, which would cost as much as the call.
	var st uint32
	var n uintptr
	for {
		var e unix.Errno
		n, _, e = unix.RawSyscall6(unix.SYS_WAIT4, uintptr(tid), uintptr(unsafe.Pointer(&st)), uintptr(flags|unix.WALL|unix.WNOTHREAD), 0, 0, 0)
		if e == 0 {
			break
		}
		if e == unix.ECHILD && tid != -1 && tid != t.pid {
			delete(t.others, tid)
			return 0, nil
		}
		if e != unix.EINTR {
			return 0, fmt.Errorf("waiting for thread %d of the child: %w", tid, e)
		}
	}
	if n == 0 {
		return 0, nil
	}
	t.wstatus = unix.WaitStatus(st)
	who := int(n)
	if !t.wstatus.Stopped() {
		delete(t.others, who)
		t.over = who == t.pid
		return who, nil
	}
	if who == t.worker && t.others[who] == nil {
		t.adopt()
		return who, nil
	}
	th := t.others[who]
	if th == nil {
		th = &thread{}
		t.others[who] = th
	}
	th.stopped = true
	if s := t.wstatus.StopSignal(); s != unix.SIGTRAP && s != unix.SIGTRAP|0x80 && s != unix.SIGSTOP {
		th.signal = int(s)
	}
	return who, nil
}

// adopt notes the thread that the worker has just started. It stands still.
func (t *tracer) adopt() {
	if t.wstatus.TrapCause() != unix.PTRACE_EVENT_CLONE {
		return
	}
	tid, err := unix.PtraceGetEventMsg(t.worker)
	if err == nil && t.others[int(tid)] == nil {
		t.others[int(tid)] = &thread{}
	}
}

func (t *tracer) ptrace(request, tid int, addr, data uintptr) error {
	_, _, e := unix.RawSyscall6(unix.SYS_PTRACE, uintptr(request), uintptr(tid), addr, data, 0, 0)
	if e != 0 {
		return e
	}
	return nil
}
