package main

import (
	"errors"
	"fmt"
	"testing"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/internal/admin"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

func TestExitCode(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		err  error
		want int
	}{
		{nil, exitDone},
		{errors.New("x"), exitFailed},
		{nvmmirror.ErrOutcomeUnknown, exitFailed},
		{&nvmmirror.ErrNotPrimary{}, exitFailed},
		{usageErrorf("x"), exitUsage},
		{damageErrorf("x"), exitDamage},
		{nvmmirror.ErrNotRegion, exitUsage},
		{&nvmmirror.NewerError{}, exitUsage},
		{&pmem.FileTypeError{}, exitUsage},
		{&pmem.ClassError{}, exitUsage},
		{&nvmmirror.WeakerError{}, exitUsage},
		{&pmem.InUseError{}, exitFailed},
		{&nvmmirror.ShutdownError{}, exitDamage},
		{&nvmmirror.LengthError{}, exitDamage},
		{&nvmmirror.CorruptError{}, exitDamage},
		{&journal.DamageError{Why: errors.New("x")}, exitDamage},
		{&nvmmirror.RefusedError{}, exitRefused},
		{&admin.Error{Kind: admin.KindFailed}, exitFailed},
		{&admin.Error{Kind: admin.KindOutcomeUnknown}, exitFailed},
		{&admin.Error{Kind: admin.KindTimeout}, exitFailed},
		{&admin.Error{Kind: admin.KindUnreachable}, exitFailed},
		{&admin.Error{Kind: admin.KindUsage}, exitUsage},
		{&admin.Error{Kind: admin.KindRange}, exitUsage},
		{&admin.Error{Kind: admin.KindDamage}, exitDamage},
		{&admin.Error{Kind: admin.KindRefused}, exitRefused},
	} {
		err := c.err
		if err != nil {
			err = fmt.Errorf("region: %w", err)
		}
		if got := exitCode(err); got != c.want {
			t.Errorf("%v: %d, not %d", err, got, c.want)
		}
	}
}
