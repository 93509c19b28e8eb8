package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/sys/unix"
)

// benchProgress shows how far a measurement is, in time: a bar where to is a
// terminal, else a line from time to time. end must be called.
func benchProgress(ctx context.Context, to io.Writer) (progress func(done, total time.Duration, what string), end func()) {
	if f, ok := to.(*os.File); ok {
		if _, err := unix.IoctlGetTermios(int(f.Fd()), unix.TCGETS); err == nil {
			return benchBar(ctx, f)
		}
	}
	const pause = 10 * time.Second
	begin := time.Now()
	shown := begin
	return func(done, total time.Duration, what string) {
		if time.Since(shown) < pause {
			return
		}
		shown = time.Now()
		left := ""
		if done > 0 {
			// The plan's own times are a guess; what has passed corrects it.
			left = fmt.Sprintf(", about %v left", time.Duration(float64(shown.Sub(begin))*float64(total-done)/float64(done)).Round(time.Second))
		}
		fmt.Fprintf(to, "%3d %%%s: %s\n", 100*done/max(1, total), left, what)
	}, func() {}
}

func benchBar(ctx context.Context, f *os.File) (progress func(done, total time.Duration, what string), end func()) {
	p := mpb.NewWithContext(ctx, mpb.WithOutput(f), mpb.WithWidth(40))
	var doing atomic.Value // its reader is a goroutine of mpb's
	doing.Store("")
	var bar *mpb.Bar
	progress = func(done, total time.Duration, what string) {
		if bar == nil {
			bar = p.AddBar(int64(total), mpb.BarRemoveOnComplete(),
				mpb.PrependDecorators(decor.Percentage(decor.WCSyncSpace)),
				mpb.AppendDecorators(decor.AverageETA(decor.ET_STYLE_GO, decor.WCSyncSpace), decor.Any(func(decor.Statistics) string { return "  " + doing.Load().(string) })))
		}
		doing.Store(fmt.Sprintf("%-64s", what))
		bar.SetCurrent(int64(done))
	}
	return progress, func() {
		if bar != nil {
			bar.Abort(true)
		}
		p.Wait()
	}
}
