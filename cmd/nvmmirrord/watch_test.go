package main

import (
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest/observer"
)

// Reasons that take turns are said once a minute, and not each time.
func TestWatchTells(t *testing.T) {
	core, logs := observer.New(zap.InfoLevel)
	w := &watch{log: zap.New(core), said: map[string]time.Time{}}
	now := time.Now()
	for i, c := range []struct {
		after    time.Duration
		degraded []string
		said     int
	}{
		{0, nil, 0},
		{time.Second, []string{"peer lost: no route; 1 failure"}, 1},
		{time.Second, []string{"peer lost: in 7 s; 2 failures"}, 2},
		{time.Second, []string{"peer lost: no route; 3 failures"}, 2},
		{time.Second, []string{"peer lost: in 9 s; 4 failures"}, 2},
		{time.Second, []string{"peer lost: in 9 s", "3 damaged blocks"}, 3},
		{time.Second, []string{"peer lost: no route"}, 4},
		{remindEvery, []string{"peer lost: no route"}, 5},
		{time.Second, nil, 6},
		{time.Second, []string{"peer lost: no route"}, 7},
	} {
		now = now.Add(c.after)
		w.tell(c.degraded, now)
		if logs.Len() != c.said {
			t.Fatalf("step %d: %d lines, want %d", i, logs.Len(), c.said)
		}
	}
}
