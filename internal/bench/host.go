package bench

import (
	"bufio"
	"os"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Host is what a measurement's figures depend on.
type Host struct {
	Name       string `json:"name"`
	Kernel     string `json:"kernel"`
	CPU        string `json:"cpu"`
	Processors int    `json:"processors"`
	Go         string `json:"go"`
	Memory     int64  `json:"memory_bytes"`
	Virtual    bool   `json:"virtual"`            // a hypervisor is under it
	Congestion string `json:"congestion_control"` // of the system; the data's sockets choose their own
	Load       string `json:"load"`               // average over 1, 5 and 15 minutes, at the start
}

// ThisHost describes the machine that it runs on.
func ThisHost() (*Host, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, os.NewSyscallError("uname", err)
	}
	h := &Host{
		Name: unix.ByteSliceToString(u.Nodename[:]), Kernel: unix.ByteSliceToString(u.Release[:]),
		CPU: runtime.GOARCH, Processors: runtime.NumCPU(), Go: runtime.Version(),
	}
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return nil, os.NewSyscallError("sysinfo", err)
	}
	h.Memory = int64(info.Totalram) * int64(info.Unit)
	// None of the files need be there.
	if b, err := os.ReadFile("/proc/sys/net/ipv4/tcp_congestion_control"); err == nil {
		h.Congestion = strings.TrimSpace(string(b))
	}
	if b, err := os.ReadFile("/proc/loadavg"); err == nil {
		if f := strings.Fields(string(b)); len(f) >= 3 {
			h.Load = strings.Join(f[:3], " ")
		}
	}
	if f, err := os.Open("/proc/cpuinfo"); err == nil {
		defer f.Close()
		lines := bufio.NewScanner(f)
		for lines.Scan() {
			name, value, _ := strings.Cut(lines.Text(), ":")
			switch strings.TrimSpace(name) {
			case "model name":
				h.CPU = strings.TrimSpace(value)
			case "flags":
				h.Virtual = slices.Contains(strings.Fields(value), "hypervisor")
			}
		}
	}
	return h, nil
}
