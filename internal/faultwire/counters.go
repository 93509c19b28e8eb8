package faultwire

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Counters are a namespace's protocol counters by group and name, as
// "TcpExt.TCPMD5Failure", "Tcp.InCsumErrors" or "Ip6InTruncatedPkts".
type Counters map[string]uint64

// Counters that this package's faults raise.
const (
	MD5Failure    = "TcpExt.TCPMD5Failure"
	MD5NotFound   = "TcpExt.TCPMD5NotFound"
	MD5Unexpected = "TcpExt.TCPMD5Unexpected"
	CsumErrors    = "Tcp.InCsumErrors"
	InTruncated   = "IpExt.InTruncatedPkts"
	InTruncated6  = "Ip6InTruncatedPkts"
	// QueueDrops counts what the device threw away because the relay was too
	// slow: a loss that no plan asked for.
	QueueDrops = "Device.TxDropped"
)

// Rise is how far a counter is above an earlier reading.
func (c Counters) Rise(before Counters, name string) uint64 { return c[name] - before[name] }

// Counters reads the namespace's counters.
func (h *Host) Counters() (Counters, error) {
	c := Counters{}
	err := h.Do(func() error {
		for _, name := range []string{"netstat", "snmp"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + name)
			if err != nil {
				return err
			}
			if err := c.addPaired(b); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
		}
		b, err := os.ReadFile("/proc/thread-self/net/dev")
		if err != nil {
			return err
		}
		if err := c.addDevice(b); err != nil {
			return err
		}
		// Absent where IPv6 is off.
		b, err = os.ReadFile("/proc/thread-self/net/snmp6")
		if os.IsNotExist(err) {
			return nil
		}
		c.addColumns(b)
		return err
	})
	return c, err
}

// addPaired reads a file of line pairs: "Group: names…" and "Group: values…".
func (c Counters) addPaired(b []byte) error {
	lines := bufio.NewScanner(bytes.NewReader(b))
	lines.Buffer(nil, len(b)+1)
	for lines.Scan() {
		names := strings.Fields(lines.Text())
		if !lines.Scan() {
			return fmt.Errorf("no values for %q", names)
		}
		values := strings.Fields(lines.Text())
		if len(names) != len(values) || len(names) == 0 || names[0] != values[0] {
			return fmt.Errorf("names and values do not pair at %q", values)
		}
		group := strings.TrimSuffix(names[0], ":")
		for i := 1; i < len(names); i++ {
			// Tcp.MaxConn is -1; what is not a count is left out.
			if v, err := strconv.ParseUint(values[i], 10, 64); err == nil {
				c[group+"."+names[i]] = v
			}
		}
	}
	return lines.Err()
}

// addDevice reads the wire's line of the device table: its name, eight counts
// of what was received, then sent bytes, packets, errors and drops.
func (c Counters) addDevice(b []byte) error {
	const drops = 8 + 3
	for line := range strings.Lines(string(b)) {
		name, counts, _ := strings.Cut(line, ":")
		f := strings.Fields(counts)
		if strings.TrimSpace(name) != deviceName || len(f) <= drops {
			continue
		}
		v, err := strconv.ParseUint(f[drops], 10, 64)
		c[QueueDrops] = v
		return err
	}
	return fmt.Errorf("no device %q", deviceName)
}

// addColumns reads a file of lines "name value".
func (c Counters) addColumns(b []byte) {
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) != 2 {
			continue
		}
		if v, err := strconv.ParseUint(f[1], 10, 64); err == nil {
			c[f[0]] = v
		}
	}
}
