package main

import (
	"fmt"
	"slices"
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
	file *regionFile
	log  *zap.Logger
	quit chan struct{}
	wg   sync.WaitGroup

	degraded []string // as said last, without figures and advice
	said     time.Time
	state    string
}

// startWatch begins; stop must follow before the volume is closed.
func startWatch(v *nvmmirror.Volume, file *regionFile, log *zap.Logger) *watch {
	w := &watch{v: v, file: file, log: log, quit: make(chan struct{})}
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
	s.Degraded = append(s.Degraded, w.file.degraded()...)
	// Figures grow, and which counters do differs from one attempt to the
	// next, while a reason stays the same.
	var same []string
	for _, d := range s.Degraded {
		reason, _, _ := strings.Cut(d, ";")
		same = append(same, withoutFigures(reason))
	}
	switch {
	case len(same) == 0 && len(w.degraded) > 0:
		w.log.Info("no longer degraded")
	case len(same) > 0 && (!slices.Equal(same, w.degraded) || now.Sub(w.said) >= remindEvery):
		w.log.Warn("degraded", zap.Strings("reasons", s.Degraded))
		w.said = now
	}
	w.degraded = same
	state := fmt.Sprintf("STATUS=%s, peer %s, %d degraded", s.Role, s.Peer, len(s.Degraded))
	if state != w.state {
		w.state = state
		notify(w.log, state)
	}
}

func withoutFigures(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsDigit(r) {
			return -1
		}
		return r
	}, s)
}
