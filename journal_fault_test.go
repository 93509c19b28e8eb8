package nvmmirror

import (
	"errors"
	"strings"
	"testing"
)

// badFence is memory whose fences fail while broken.
type badFence struct {
	*heapMemory
	broken error
}

func (m *badFence) Fence() error { return m.broken }

// A segment that could not be made durable is a final error, as every other
// one of persistence: the node says so, and acknowledges nothing more, though
// the memory may work again.
func TestFailedAppendIsFinal(t *testing.T) {
	mem := &badFence{heapMemory: newImage(t, smallSize, smallJournal)}
	v := openQuiet(t, mem)
	if _, err := v.WriteAt([]byte("durable"), 0); err != nil {
		t.Fatal(err)
	}
	mem.broken = errors.New("the medium is gone")
	if _, err := v.WriteAt([]byte("not durable"), 0); !errors.Is(err, mem.broken) {
		t.Fatalf("%v", err)
	}
	mem.broken = nil
	if s := strings.Join(v.Status().Degraded, "; "); !strings.Contains(s, "persistence failed: ") || !strings.Contains(s, "the medium is gone") {
		t.Errorf("status says %q", s)
	}
	if _, err := v.WriteAt([]byte("x"), 0); err == nil {
		t.Error("it acknowledges again")
	}
}
