package vm

import (
	"context"
	"fmt"
	"testing"
	"time"
)

// TestBenchWire measures the transports in a guest: its kernel has AF_ALG
// sockets, which many hosts' have not. make bench-guest runs it and prints what
// bench wire says. An emulated processor makes everything slower, and not all
// of it by as much: only what is measured there compares.
func TestBenchWire(t *testing.T) {
	k := needGuests(t, "make bench-guest")
	bin := buildTools(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Minute)
	defer cancel()
	g, err := Boot(ctx, k, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer g.Close()
	fmt.Printf("kernel %s in QEMU without KVM\n", k.Release())
	status, err := g.Run(ctx, bin+"/nvmmirrord bench wire --duration 2s --connections 1,2 --sizes 64,4KiB,64KiB", func(line string) { fmt.Println(line) })
	if err != nil || status != 0 {
		t.Fatalf("status %d, %v", status, err)
	}
}
