package transport

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const netstat = `TcpExt: SyncookiesSent TCPMD5NotFound TCPMD5Unexpected TCPMD5Failure TCPGSODropped
TcpExt: 9 1 2 3 9
IpExt: InNoRoutes TCPMD5Failure
IpExt: 9 9
`

func TestParseCounters(t *testing.T) {
	for _, c := range []struct {
		name, text string
		want       Counters
		wrong      string
	}{
		{"today's", netstat, Counters{MD5NotFound: 1, MD5Unexpected: 2, MD5Failure: 3}, ""},
		{"other section first", "IpExt: TCPMD5Failure\nIpExt: 9\n" + netstat, Counters{MD5NotFound: 1, MD5Unexpected: 2, MD5Failure: 3}, ""},
		{"older kernel", "TcpExt: A TCPMD5NotFound\nTcpExt: 1 5\n", Counters{MD5NotFound: 5}, ""},
		{"values cut short", "TcpExt: TCPMD5NotFound TCPMD5Failure\nTcpExt: 5\n", Counters{MD5NotFound: 5}, ""},
		{"values too many", "TcpExt: TCPMD5NotFound\nTcpExt: 5 6 7\n", Counters{MD5NotFound: 5}, ""},
		{"negative elsewhere", "TcpExt: MaxConn TCPMD5Failure\nTcpExt: -1 4\n", Counters{MD5Failure: 4}, ""},
		{"largest", "TcpExt: TCPMD5Failure\nTcpExt: 18446744073709551615\n", Counters{MD5Failure: 1<<64 - 1}, ""},
		{"not a number", "TcpExt: TCPMD5Failure\nTcpExt: many\n", Counters{}, `TCPMD5Failure is "many"`},
		{"no values", "TcpExt: TCPMD5Failure\n", Counters{}, `no values of section "TcpExt:"`},
		{"empty", "", Counters{}, `no values of section "TcpExt:"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			got, err := parseNetstat([]byte(c.text))
			if c.wrong != "" {
				if err == nil || !strings.Contains(err.Error(), c.wrong) {
					t.Fatalf("%v does not say %q", err, c.wrong)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(c.want, got); d != "" {
				t.Error(d)
			}
		})
	}
}

func parseNetstat(text []byte) (Counters, error) {
	var c Counters
	err := parseCounters(text, "TcpExt:", map[string]*uint64{
		"TCPMD5NotFound": &c.MD5NotFound, "TCPMD5Unexpected": &c.MD5Unexpected, "TCPMD5Failure": &c.MD5Failure,
	})
	return c, err
}

func FuzzParseCounters(f *testing.F) {
	f.Add([]byte(netstat))
	f.Add([]byte("TcpExt:\nTcpExt:\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		got, err := parseNetstat(text)
		if err != nil && got != (Counters{}) && !strings.Contains(err.Error(), "not a count") {
			t.Fatalf("%+v along with %v", got, err)
		}
	})
}

func TestCountersSub(t *testing.T) {
	now := Counters{MD5Failure: 5, MD5NotFound: 4, MD5Unexpected: 3, RetransSegs: 2, InCsumErrors: 1}
	then := Counters{MD5Failure: 1, MD5NotFound: 1, MD5Unexpected: 1, RetransSegs: 9, InCsumErrors: 1}
	want := Counters{MD5Failure: 4, MD5NotFound: 3, MD5Unexpected: 2}
	if d := cmp.Diff(want, now.Sub(then)); d != "" {
		t.Error(d)
	}
}

func TestDiagnose(t *testing.T) {
	if d := (Counters{RetransSegs: 5, InCsumErrors: 7}).Diagnose(); d != "" {
		t.Errorf("no MD5 counter rose, yet: %s", d)
	}
	all := Counters{MD5Failure: 3, MD5NotFound: 2, MD5Unexpected: 1}.Diagnose()
	for _, says := range []string{
		"TCPMD5Failure rose by 3: ", "key files are equal",
		"TCPMD5NotFound rose by 2: ", "peer has a key",
		"TCPMD5Unexpected rose by 1: ", "this node has a key",
	} {
		if !strings.Contains(all, says) {
			t.Errorf("%q does not say %q", all, says)
		}
	}
	if strings.Contains(all, "\n") {
		t.Error("a diagnosis is one line")
	}
}

func TestReadCounters(t *testing.T) {
	before := mustCounters(t)
	if again := mustCounters(t); again.RetransSegs < before.RetransSegs {
		t.Errorf("counters fell: %+v, then %+v", before, again)
	}
}
