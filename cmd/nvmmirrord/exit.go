package main

import (
	"errors"
	"fmt"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/internal/admin"
	"github.com/nvmmirror/nvmmirror/internal/config"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// Exit codes.
const (
	exitDone    = 0
	exitFailed  = 1
	exitUsage   = 2 // or configuration, a file that is no region of this version, or memory of too weak a class
	exitDamage  = 3 // bytes are not those that were made durable
	exitRefused = 4 // it could lose data
)

// exitError is an error with the exit code that it ends the program with.
type exitError struct {
	code int
	err  error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

func usageErrorf(format string, args ...any) error {
	return &exitError{exitUsage, fmt.Errorf(format, args...)}
}

func damageErrorf(format string, args ...any) error {
	return &exitError{exitDamage, fmt.Errorf(format, args...)}
}

// exitCode is the exit code of a command's error: that of an [exitError], else
// what the type of the error means.
func exitCode(err error) int {
	var coded *exitError
	var answer *admin.Error
	var refused *nvmmirror.RefusedError
	var corrupt *nvmmirror.CorruptError
	var length *nvmmirror.LengthError
	var dirty *nvmmirror.ShutdownError
	var newer *nvmmirror.NewerError
	var size *nvmmirror.SizeError
	var damage *journal.DamageError
	var wrong *config.Error
	var kind *pmem.FileTypeError
	var class *pmem.ClassError
	var weaker *nvmmirror.WeakerError
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &coded):
		return coded.code
	case errors.As(err, &wrong), errors.As(err, &newer), errors.As(err, &size), errors.As(err, &kind), errors.As(err, &class), errors.As(err, &weaker), errors.Is(err, nvmmirror.ErrNotRegion):
		return exitUsage
	case errors.As(err, &refused):
		return exitRefused
	case errors.As(err, &corrupt), errors.As(err, &length), errors.As(err, &dirty), errors.As(err, &damage):
		return exitDamage
	case errors.As(err, &answer):
		switch answer.Kind {
		case admin.KindRefused:
			return exitRefused
		case admin.KindDamage:
			return exitDamage
		case admin.KindUsage, admin.KindRange: // a volume does not grow
			return exitUsage
		}
	}
	return exitFailed
}
