package nvmmirror

import (
	"testing"
	"time"
)

// A primary that goes on alone commits faster than a slow wire takes the log
// to the peer that returned. The peer still gets in sync, within a bound: the
// writers pause for what it has not got.
func TestJoinWhileWritersAreFasterThanTheWire(t *testing.T) {
	t.Parallel()
	a, b := newPair(t, testConfig{opt: Options{OnPeerLoss: Alone}, quiet: true, timeout: time.Second})
	a.promote(false)
	a.inSync()
	b.inSync()
	b.close()
	a.until("alone", func(s Status) bool { return s.Peer == "lost" && !a.pair.Required() })
	a.wire.setChop(16<<10, 2*time.Millisecond) // 8 MB/s at most
	l := startLoad(t, 8, func() *Volume { return a.Volume })
	l.more(100)
	b.open()
	b.inSync()
	a.inSync()
	a.wire.setChop(0, 0)
	l.more(100)
	l.end()
	l.check(a)
	identical(t, a, b)
}
