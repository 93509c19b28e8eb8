package main

import (
	"fmt"
	"strings"
	"sync"
	"time"
	"unicode"

	"go.uber.org/zap"

	"github.com/nvmmirror/nvmmirror"
)

const (
	watchEvery  = 4 * time.Second // what is degraded lasts; each look wakes an idle processor
	remindEvery = time.Minute
)

// watch keeps log and service manager told about what is degraded, as long as
// it lasts.
type watch struct {
	v    *nvmmirror.Volume
	more func() []string // reasons that the volume does not know of
	log  *zap.Logger
	quit chan struct{}
	wg   sync.WaitGroup

	degraded int                  // reasons seen last
	said     map[string]time.Time // when each was, since all was well
	state    string
}

// startWatch begins; stop must follow before the volume is closed.
func startWatch(v *nvmmirror.Volume, more func() []string, log *zap.Logger) *watch {
	w := &watch{v: v, more: more, log: log, quit: make(chan struct{}), said: map[string]time.Time{}}
	w.wg.Go(func() {
		t := time.NewTicker(watchEvery)
		defer t.Stop()
		for {
			w.look(time.Now())
			select {
			case <-t.C:
			case <-w.quit:
				return
			}
		}
	})
	return w
}

func (w *watch) stop() {
	close(w.quit)
	w.wg.Wait()
}

func (w *watch) look(now time.Time) {
	s := w.v.Status()
	s.Degraded = append(s.Degraded, w.more()...)
	w.tell(s.Degraded, now)
	state := fmt.Sprintf("STATUS=%s, peer %s, %d degraded", s.Role, s.Peer, len(s.Degraded))
	if state != w.state {
		w.state = state
		notify(w.log, state)
	}
}

// tell logs what is degraded: when a reason comes that was not said in the last
// minute, when there are fewer, and each minute. Reasons that take turns are not
// said each time.
func (w *watch) tell(degraded []string, now time.Time) {
	fewer := len(degraded) < w.degraded
	due := fewer
	for _, d := range degraded {
		said, ok := w.said[sameReason(d)]
		due = due || !ok || now.Sub(said) >= remindEvery
	}
	switch {
	case len(degraded) == 0 && w.degraded > 0:
		w.log.Info("no longer degraded")
		clear(w.said)
	case len(degraded) > 0 && due:
		w.log.Warn("degraded", zap.Strings("reasons", degraded))
		if fewer {
			clear(w.said) // what is not in this line is news when it comes back
		}
		for _, d := range degraded {
			w.said[sameReason(d)] = now
		}
	}
	w.degraded = len(degraded)
}

// sameReason is what stays of a reason: figures grow, and which counters do, behind
// a semicolon, differs from one attempt to the next.
func sameReason(s string) string {
	s, _, _ = strings.Cut(s, ";")
	return withoutFigures(s)
}

func withoutFigures(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsDigit(r) {
			return -1
		}
		return r
	}, s)
}
