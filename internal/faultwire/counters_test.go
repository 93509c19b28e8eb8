package faultwire

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestCountersRead(t *testing.T) {
	c := Counters{}
	if err := c.addPaired([]byte("Tcp: MaxConn InErrs\nTcp: -1 7\nTcpExt: TCPMD5Failure\nTcpExt: 18446744073709551615\n")); err != nil {
		t.Fatal(err)
	}
	c.addColumns([]byte("Ip6InReceives                   \t12\nodd line here\n"))
	if err := c.addDevice([]byte("Inter-| Receive\n    lo: 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1\n  wire: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n")); err != nil {
		t.Fatal(err)
	}
	want := Counters{"Tcp.InErrs": 7, MD5Failure: 1<<64 - 1, "Ip6InReceives": 12, QueueDrops: 12}
	if d := cmp.Diff(want, c); d != "" {
		t.Error(d)
	}
	if n := c.Rise(Counters{"Tcp.InErrs": 5}, "Tcp.InErrs"); n != 2 {
		t.Errorf("rise %d", n)
	}
}

func TestCountersRefuse(t *testing.T) {
	for _, s := range []string{"Tcp: A\n", "Tcp: A\nTcp: 1 2\n", "Tcp: A\nUdp: 1\n", "\n\n"} {
		if (Counters{}).addPaired([]byte(s)) == nil {
			t.Errorf("%q was taken", s)
		}
	}
	for _, s := range []string{"", "wire: 1 2 3\n", "wire: 1 2 3 4 5 6 7 8 9 10 11 x\n"} {
		if (Counters{}).addDevice([]byte(s)) == nil {
			t.Errorf("%q was taken", s)
		}
	}
}
