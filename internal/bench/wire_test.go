package bench

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func shortWire(t testing.TB) WireOptions {
	return WireOptions{
		Transports: Transports(), Sizes: []int{8, 5000, maxMessage}, Connections: []int{1, 3},
		Duration: 15 * time.Millisecond, Verify: VerifyAll, Program: program(t),
	}
}

// checkWire checks that a result is whole and plausible.
func checkWire(t *testing.T, o WireOptions, r *WireResult) {
	t.Helper()
	if len(r.Paths) != max(1, len(o.MTUs)) || r.Driver == nil || r.Other == nil {
		t.Fatalf("%d paths between %v and %v", len(r.Paths), r.Driver, r.Other)
	}
	for _, p := range r.Paths {
		if p.MTU < 1500 || p.Congestion != "cubic" && p.Congestion != "reno" {
			t.Errorf("MTU %d, congestion control %q", p.MTU, p.Congestion)
		}
		for i, m := range p.Transports {
			if m.Transport != o.Transports[i] {
				t.Errorf("transport %d is %s", i, m.Transport)
			}
			if m.Skipped != "" {
				t.Logf("%s is skipped: %s", m.Transport, m.Skipped)
				if m.Transport != MD5Kernel && m.Transport != MD5Sig {
					t.Errorf("%s needs nothing of the kernel", m.Transport)
				}
				continue
			}
			if len(m.RoundTrips) != 2*len(o.Sizes) || len(m.Throughput) != len(o.Connections) {
				t.Errorf("%s: %d round trips, %d streams", m.Transport, len(m.RoundTrips), len(m.Throughput))
			}
			for _, r := range m.RoundTrips {
				h, err := hdrhistogram.Decode([]byte(r.HDR))
				if err != nil || latencyOf(h) != r.Latency {
					t.Errorf("%s: the histogram, %v, is not that of %+v", m.Transport, err, r)
				}
				if r.P50 <= 0 || r.P50 > r.P99 || r.P99 > r.P999 || r.Count == 0 {
					t.Errorf("%s: %+v", m.Transport, r)
				}
			}
			for _, s := range m.Throughput {
				if s.MB <= 0 || s.Driver.Calls <= 0 || s.Other.Calls <= 0 || s.Driver.User+s.Driver.System <= 0 {
					t.Errorf("%s: %+v", m.Transport, s)
				}
			}
			if m.PeakDriver <= 0 || m.PeakOther <= 0 {
				t.Errorf("%s: peaks %d and %d", m.Transport, m.PeakDriver, m.PeakOther)
			}
		}
	}
	var text bytes.Buffer
	if err := r.Print(&text); err != nil {
		t.Error(err)
	}
	for _, want := range []string{"round trip, sleeping", "round trip, polling", "throughput", "peak resident", "tls "} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, text.String())
		}
	}
}

func TestWire(t *testing.T) {
	o := shortWire(t)
	r, err := Wire(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	checkWire(t, o, r)
	b, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"round_trips", "throughput", "p50_us", "p999_us", "mb_per_s", "user_s_per_gib", "machine_softirq_s_per_gib",
		"context_switches_per_gib", "system_calls_per_gib", "socket_memory_bytes", "peak_rss_driver_bytes", "verified"} {
		if !bytes.Contains(b, []byte(`"`+key+`"`)) {
			t.Errorf("no key %s", key)
		}
	}
}

// The server is a process of its own, as it always is: ends that block outside
// of the Go scheduler's sight, both in one process, would wait for each other as
// soon as the garbage collector stops one of them.
func TestWireServer(t *testing.T) {
	server, address := startWireServer(t)
	o := shortWire(t)
	o.Program, o.Sizes, o.Connections = nil, []int{64}, []int{2}
	o.Client = address
	for range 2 { // one driver after the other
		r, err := Wire(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		checkWire(t, o, r)
	}
	if err := server.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := server.Wait(); err != nil {
		t.Error(err)
	}
}

func startWireServer(t *testing.T) (server *exec.Cmd, address string) {
	t.Helper()
	server = exec.Command(program(t)[0], serverArgument)
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := server.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { server.Process.Kill() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return server, strings.TrimSpace(strings.TrimPrefix(line, "listening on "))
}

// TestWireServerIsBusy: a driver that would have to wait for long is told for
// whom, and a peer that stops in the middle keeps nobody from ending the server.
func TestWireServerIsBusy(t *testing.T) {
	server, address := startWireServer(t)
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	c := &controller{in: bufio.NewReader(conn), out: conn}
	if _, err := c.ask(request{Op: opHello}); err != nil {
		t.Fatal(err)
	}
	a, err := c.ask(request{Op: opListen, Setup: &setup{Transport: TLS, Connections: 1, Pin: make([]byte, 32)}})
	if err != nil {
		t.Fatal(err)
	}
	data, err := net.Dial("tcp", netip.AddrPortFrom(loopback, a.Port).String())
	if err != nil {
		t.Fatal(err)
	}
	defer data.Close()
	line, err := json.Marshal(request{Op: opAccept, Protocol: protocol})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write(append(line, '\n')); err != nil { // and no handshake
		t.Fatal(err)
	}
	o := shortWire(t)
	o.Program, o.Client = nil, address
	if _, err := Wire(t.Context(), o); err == nil || !strings.Contains(err.Error(), "busy with a measurement from "+conn.LocalAddr().String()) {
		t.Errorf("%v", err)
	}
	if err := server.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := server.Wait(); err != nil {
		t.Error(err)
	}
}

// TestWireServerBesideASleeper: while a thread sleeps for a driver that says no more, the
// rest of the process goes on, with one processor for Go and where the garbage
// collector would run, and ends when it is told to.
func TestWireServerBesideASleeper(t *testing.T) {
	for _, setting := range []string{"GOMAXPROCS=1", "GOGC=1"} {
		t.Run(setting, func(t *testing.T) {
			name, value, _ := strings.Cut(setting, "=")
			t.Setenv(name, value)
			server, address := startWireServer(t)
			conn, err := net.Dial("tcp", address)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			conn.SetDeadline(time.Now().Add(time.Minute)) // against hanging
			c := &controller{in: bufio.NewReader(conn), out: conn, local: loopback, peer: loopback, ns: netns.None()}
			s, err := c.open(t.Context(), setup{Transport: Plain, Connections: 1})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := c.ask(request{Op: opBegin, Work: &work{Size: 8, Verify: VerifyNone}}); err != nil {
				t.Fatal(err)
			}
			message := []byte("12345678")
			if err := errors.Join(s.links[0].send(message), full(s.links[0], message)); err != nil {
				t.Fatal(err)
			}
			for range 1000 { // of which each allocates
				if _, err := c.ask(request{Op: opPeak}); err != nil {
					server.Process.Kill() // so that s can be closed
					t.Fatal(err)
				}
			}
			if err := server.Process.Signal(os.Interrupt); err != nil {
				t.Fatal(err)
			}
			if err := server.Wait(); err != nil {
				t.Error(err)
			}
			s.close()
		})
	}
}

// TestWireServerOutOfDescriptors: a server that can take nobody in for a while goes on.
func TestWireServerOutOfDescriptors(t *testing.T) {
	server, address := startWireServer(t)
	dial := func() *controller {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return &controller{in: bufio.NewReader(conn), out: conn}
	}
	first := dial()
	if _, err := first.ask(request{Op: opHello}); err != nil {
		t.Fatal(err)
	}
	limit := unix.Rlimit{Cur: 3, Max: 1024} // below what is open
	if err := unix.Prlimit(server.Process.Pid, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		t.Fatal(err)
	}
	second := dial()
	for range 200 { // meanwhile it tries to accept
		if _, err := first.ask(request{Op: opHangUp}); err != nil {
			t.Fatal(err)
		}
	}
	limit.Cur = limit.Max
	if err := unix.Prlimit(server.Process.Pid, unix.RLIMIT_NOFILE, &limit, nil); err != nil {
		t.Fatal(err)
	}
	first.out.(net.Conn).Close()
	if _, err := second.ask(request{Op: opHello}); err != nil {
		t.Error(err)
	}
}

// TestWireServerIsImpatient: of a driver whose host is gone the server hears nothing, and
// must ask. The kernel does: here it is looked at whether it was told when to give up.
func TestWireServerIsImpatient(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	driver, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer driver.Close()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error)
	go func() { ended <- serveDriver(t.Context(), conn, io.Discard) }()
	c := &controller{in: bufio.NewReader(driver), out: driver}
	if _, err := c.ask(request{Op: opHello}); err != nil {
		t.Error(err)
	}
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	for option, want := range map[int]int{unix.TCP_USER_TIMEOUT: int(silentTime.Milliseconds()), unix.TCP_KEEPIDLE: 5, unix.TCP_KEEPINTVL: 5} {
		if err := raw.Control(func(fd uintptr) {
			if is, err := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, option); err != nil || is != want {
				t.Errorf("option %d is %d, %v, not %d", option, is, err, want)
			}
		}); err != nil {
			t.Error(err)
		}
	}
	driver.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestWireServerStops: a server whose process is stopped, in the middle of a
// measurement, ends that: the kernel keeps its connection.
func TestWireServerStops(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		t.Cleanup(func() { conn.Close() })
		bufio.NewReader(conn).ReadBytes('\n')
		conn.Write([]byte("{}\n")) // and no more
	}()
	o := shortWire(t)
	o.Client = l.Addr().String()
	w := &wire{o: o, r: &WireResult{}, silent: 300 * time.Millisecond}
	ended := make(chan error, 1)
	go func() { ended <- w.remote(t.Context()) }()
	select {
	case err := <-ended:
		if err == nil || !strings.Contains(err.Error(), "has said nothing for 300ms") {
			t.Errorf("%v", err)
		}
	case <-time.After(10 * time.Second):
		t.Error("it waits")
	}
}

// TestWireServerWithoutEnd: what a driver is pointed at by mistake may send without end.
func TestWireServerWithoutEnd(t *testing.T) {
	in, out := io.Pipe()
	defer in.Close()
	sent := make(chan int)
	go func() {
		piece := make([]byte, 64<<10)
		n := 0
		for {
			k, err := out.Write(piece)
			if n += k; err != nil || n > 16*maxLine {
				out.Close()
				sent <- n
				return
			}
		}
	}()
	c := &controller{in: bufio.NewReader(in), out: io.Discard}
	if _, err := c.ask(request{Op: opHello}); err == nil || !strings.Contains(err.Error(), "does not speak the protocol") {
		t.Errorf("%v", err)
	}
	in.Close()
	if n := <-sent; n > 2*maxLine {
		t.Errorf("%d bytes of one line were read", n)
	}
}

// TestWireServerKnowsTransports: what the server does not know would be measured as
// plain, under another name.
func TestWireServerKnowsTransports(t *testing.T) {
	e := &farEnd{local: loopback, peer: loopback, listener: -1}
	defer e.close()
	if _, err := e.do(request{Op: opListen, Setup: &setup{Transport: "quic", Connections: 1}}); err == nil || !strings.Contains(err.Error(), `no transport "quic"`) {
		t.Errorf("%v", err)
	}
}

// TestWireProgress: what moves slowly is not cut off, what does not move is.
func TestWireProgress(t *testing.T) {
	const limit = 2 * time.Second
	l, port, err := listen(loopback, loopback, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(l)
	out, err := dial(loopback, netip.AddrPortFrom(loopback, port), nil)
	if err != nil {
		t.Fatal(err)
	}
	from := &rawLink{fd: out}
	defer from.close()
	in, err := accept(l)
	if err != nil {
		t.Fatal(err)
	}
	to := &rawLink{fd: in}
	defer to.close()
	stalled := watchProgress([]link{from}, limit)
	var b [1]byte
	for begin := time.Now(); time.Since(begin) < limit*3/2; {
		if err := from.send(b[:]); err != nil {
			t.Fatal(err)
		}
		if err := full(to, b[:]); err != nil {
			t.Fatal(err)
		}
	}
	if err := full(from, b[:]); !errors.Is(err, io.ErrUnexpectedEOF) { // it waits until it is cut off
		t.Errorf("%v", err)
	}
	if !stalled() {
		t.Error("it was cut off by something else")
	}
}

// TestZones: a link-local address is one of an interface.
func TestZones(t *testing.T) {
	for text, want := range map[string]uint32{"fe80::1%lo": 1, "fe80::1%7": 7, "fe80::1": 0} {
		s := sockaddr(netip.AddrPortFrom(netip.MustParseAddr(text), 1)).(*unix.SockaddrInet6)
		if s.ZoneId != want {
			t.Errorf("%s: zone %d, not %d", text, s.ZoneId, want)
		}
	}
}

func TestWireNamespaces(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: network namespaces")
	}
	o := shortWire(t)
	o.Sizes, o.Connections, o.MTUs = []int{64}, []int{2}, []int{1500, 9000}
	r, err := Wire(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	checkWire(t, o, r)
	if r.Paths[0].MTU != 1500 || r.Paths[1].MTU != 9000 {
		t.Errorf("%+v", r.Paths)
	}
}

func TestWireOptions(t *testing.T) {
	for option, change := range map[string]func(*WireOptions){
		"sizes":       func(o *WireOptions) { o.Sizes = []int{7} },
		"connections": func(o *WireOptions) { o.Connections = []int{0} },
		"mtu":         func(o *WireOptions) { o.MTUs = []int{100} },
		"transports":  func(o *WireOptions) { o.Transports = nil },
		"duration":    func(o *WireOptions) { o.Duration = 0 },
		"placement":   func(o *WireOptions) { o.Placement = "anywhere" },
		"verify":      func(o *WireOptions) { o.Verify = VerifyNone },
		"netns":       func(o *WireOptions) { o.Client, o.MTUs = "localhost:1", []int{1500} },
	} {
		o := shortWire(t)
		change(&o)
		var bad *OptionError
		if _, err := Wire(t.Context(), o); !errors.As(err, &bad) || bad.Option != option {
			t.Errorf("%s: %v", option, err)
		}
	}
	for option, change := range map[string]func(*WireOptions){
		"transports":  func(o *WireOptions) { o.Transports = []Transport{Plain, TLS, Plain} },
		"sizes":       func(o *WireOptions) { o.Sizes = []int{64, 64} },
		"connections": func(o *WireOptions) { o.Connections = []int{1, 1} },
		"mtu":         func(o *WireOptions) { o.MTUs = []int{1500, 1500} },
		"placement":   func(o *WireOptions) { o.Client, o.Placement = "localhost:1", Together },
	} {
		o := shortWire(t)
		change(&o)
		var bad *OptionError
		if err := o.Check(); !errors.As(err, &bad) || bad.Option != option {
			t.Errorf("%s: %v", option, err)
		}
	}
	if _, err := ParseTransport("carrier pigeon"); err == nil {
		t.Error("a transport that there is not")
	}
}

// A byte that changes on the way is found: by the digest where there is one,
// by the comparison where there is none.
func TestWireVerifies(t *testing.T) {
	p, err := newPattern(chunk)
	if err != nil {
		t.Fatal(err)
	}
	defer p.free()
	for at := range 3 {
		got := slices.Clone(p.message(uint64(at)))
		if err := p.check(uint64(at), 0, got); err != nil {
			t.Error(err)
		}
		if p.check(uint64(at)+1, 0, got) == nil {
			t.Error("another message passes")
		}
		if got[at*20000] ^= 1; p.check(uint64(at), 0, got) == nil {
			t.Error("a changed byte passes")
		}
	}
	if p.b[0] == 0 || bytes.IndexByte(p.b, 0) >= 0 {
		t.Error("a zero byte in the pattern")
	}
}

func TestWireInterrupted(t *testing.T) {
	o := shortWire(t)
	o.Duration = time.Minute
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	begin := time.Now()
	if _, err := Wire(ctx, o); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
}

// What fails on the way to a pair of namespaces is an error.
func TestNoWirePair(t *testing.T) {
	if w, err := newWirePair(1 << 20); err == nil {
		w.close()
		t.Fatal("an MTU of 1 MiB was taken")
	}
}
