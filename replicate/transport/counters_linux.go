package transport

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Counters are the kernel's own, of one network namespace, since boot. They
// are the only trace of a wrong key: the kernel drops such segments in
// silence, and the connection just does not come about. A counter that this
// kernel does not have stays 0.
type Counters struct {
	// MD5Failure: segments whose signature did not verify.
	MD5Failure uint64 `json:"md5_failure"` // TCPMD5Failure
	// MD5NotFound: unsigned segments where a signature was required.
	MD5NotFound uint64 `json:"md5_not_found"` // TCPMD5NotFound
	// MD5Unexpected: signed segments for a socket without a key.
	MD5Unexpected uint64 `json:"md5_unexpected"` // TCPMD5Unexpected
	// RetransSegs: TCP segments sent again, for any reason.
	RetransSegs uint64 `json:"retrans_segs"`
	// InCsumErrors: TCP segments dropped for their own 16-bit checksum.
	InCsumErrors uint64 `json:"in_csum_errors"`
}

// ReadCounters reads the counters of the calling thread's network namespace.
func ReadCounters() (Counters, error) {
	var c Counters
	for _, f := range []struct {
		path, section string
		fields        map[string]*uint64
	}{
		// thread-self, as /proc/net is that of the process's first thread.
		{"/proc/thread-self/net/netstat", "TcpExt:", map[string]*uint64{
			"TCPMD5Failure":    &c.MD5Failure,
			"TCPMD5NotFound":   &c.MD5NotFound,
			"TCPMD5Unexpected": &c.MD5Unexpected,
		}},
		{"/proc/thread-self/net/snmp", "Tcp:", map[string]*uint64{
			"RetransSegs":  &c.RetransSegs,
			"InCsumErrors": &c.InCsumErrors,
		}},
	} {
		text, err := os.ReadFile(f.path)
		if err != nil {
			return Counters{}, fmt.Errorf("kernel counters: %w; is /proc mounted?", err)
		}
		if err := parseCounters(text, f.section, f.fields); err != nil {
			return Counters{}, fmt.Errorf("kernel counters: %s: %w", f.path, err)
		}
	}
	return c, nil
}

// parseCounters reads pairs of lines "Section: name name…", "Section: value
// value…". Columns come and go with kernel versions: it goes by names, skips
// those not asked for, and leaves alone those not there.
func parseCounters(text []byte, section string, fields map[string]*uint64) error {
	var names []string
	for line := range bytes.Lines(text) {
		words := strings.Fields(string(line))
		if len(words) == 0 || words[0] != section {
			continue
		}
		if names == nil {
			names = words
			continue
		}
		for i := 1; i < min(len(names), len(words)); i++ {
			dst := fields[names[i]]
			if dst == nil {
				continue
			}
			v, err := strconv.ParseUint(words[i], 10, 64)
			if err != nil {
				return fmt.Errorf("%s is %q, not a count", names[i], words[i])
			}
			*dst = v
		}
		return nil
	}
	return fmt.Errorf("no values of section %q", section)
}

// Sub returns by how much each counter rose since earlier. A counter that
// fell (another namespace, a reboot) did not rise.
func (c Counters) Sub(earlier Counters) Counters {
	rise := func(now, then uint64) uint64 {
		if now < then {
			return 0
		}
		return now - then
	}
	return Counters{
		MD5Failure:    rise(c.MD5Failure, earlier.MD5Failure),
		MD5NotFound:   rise(c.MD5NotFound, earlier.MD5NotFound),
		MD5Unexpected: rise(c.MD5Unexpected, earlier.MD5Unexpected),
		RetransSegs:   rise(c.RetransSegs, earlier.RetransSegs),
		InCsumErrors:  rise(c.InCsumErrors, earlier.InCsumErrors),
	}
}

// Diagnose names each MD5 counter that rose, in a difference of two readings,
// and what to check. It is empty when none did.
func (c Counters) Diagnose() string {
	var s []string
	add := func(n uint64, counter, means string) {
		if n > 0 {
			s = append(s, fmt.Sprintf("kernel counter %s rose by %d: %s", counter, n, means))
		}
	}
	add(c.MD5Failure, "TCPMD5Failure",
		"segments arrived signed with another key, or from an address other than the configured peer's, or damaged on the way;"+
			" check that both nodes' key files are equal and that the peer's address here is the one it sends from")
	add(c.MD5NotFound, "TCPMD5NotFound",
		"unsigned segments arrived where a signature is required;"+
			" check that the peer has a key configured and the same transport as this node, and that nothing else connects to this port")
	add(c.MD5Unexpected, "TCPMD5Unexpected",
		"signed segments arrived for a socket without a key;"+
			" check that this node has a key configured for the peer's address, and that both nodes have the same transport")
	return strings.Join(s, "; ")
}
