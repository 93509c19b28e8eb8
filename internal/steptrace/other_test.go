//go:build !amd64

package steptrace

import (
	"runtime"
	"testing"
)

func TestInstructions(t *testing.T) {
	t.Skipf("instructions are decoded for amd64 only, this is %s", runtime.GOARCH)
}
