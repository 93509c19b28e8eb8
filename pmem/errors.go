package pmem

import (
	"errors"
	"fmt"
)

var (
	// ErrInUse is what an [InUseError] matches.
	ErrInUse = errors.New("pmem: region is in use")
	// ErrPersistence is what a [PersistenceError] matches.
	ErrPersistence = errors.New("pmem: stores did not become durable")
)

// ClassError says that a path offers a weaker class than the caller accepts.
// Nothing was created or changed.
type ClassError struct {
	Path       string
	Have, Want Class
	Reason     string // why it is not a stronger class
}

func (e *ClassError) Error() string {
	return fmt.Sprintf("pmem: %s is of class %s (%s), but at least %s is required: %s",
		e.Path, e.Have, e.Reason, e.Want, e.remedy())
}

func (e *ClassError) remedy() string {
	switch {
	case e.Have == Emulated:
		return "nothing there survives a reboot; put the region on persistent memory, or accept emulated memory explicitly (for tests)"
	case e.Have == Paged:
		return "put the region on a filesystem mounted with -o dax on persistent memory, or on a devdax device, or accept class paged explicitly (every commit is then an msync)"
	}
	return "this platform does not flush its CPU caches on power failure; accept class cacheline"
}

// FileTypeError says that a path is something that a region cannot be on.
type FileTypeError struct{ Path, Problem string }

func (e *FileTypeError) Error() string { return "pmem: " + e.Path + " " + e.Problem }

// InUseError says that another open of the region holds its lock.
type InUseError struct {
	Path string
	PID  int // of the holder, 0 where unknown
}

func (e *InUseError) Error() string {
	who := "another process, or another open in this one"
	if e.PID != 0 {
		who = fmt.Sprintf("process %d", e.PID)
	}
	return fmt.Sprintf("pmem: %s is in use by %s: ask that one, or stop it first; nvmmirrord info can look at it meanwhile", e.Path, who)
}

// Is matches [ErrInUse].
func (e *InUseError) Is(target error) bool { return target == ErrInUse }

// AllocError says that the room for a region could not be allocated. Create
// leaves nothing behind.
type AllocError struct {
	Path string
	Size int64 // bytes wanted
	Free int64 // bytes that the filesystem had left before, -1 where unknown
	Err  error
}

func (e *AllocError) Error() string {
	free := ""
	if e.Free >= 0 {
		free = fmt.Sprintf(" (%d bytes free)", e.Free)
	}
	return fmt.Sprintf("pmem: no room for the %d bytes of %s%s: %v: free some space, choose another filesystem or a smaller size",
		e.Size, e.Path, free, e.Err)
}

func (e *AllocError) Unwrap() error { return e.Err }

// PersistenceError says that flushed stores could not be made durable. It is
// final: the kernel may have dropped the pages, so that a retry would succeed
// without having written them. Every later Fence returns the same error.
type PersistenceError struct {
	Path   string
	Offset int64 // of the first range that failed, in bytes
	Length int64 // of it
	Err    error
}

func (e *PersistenceError) Error() string {
	return fmt.Sprintf("pmem: %s: msync of %d bytes at offset %d: %v: stores since the last fence may be lost; look for I/O errors in the kernel log, then reopen the region, which recovers it",
		e.Path, e.Length, e.Offset, e.Err)
}

// Is matches [ErrPersistence].
func (e *PersistenceError) Is(target error) bool { return target == ErrPersistence }

func (e *PersistenceError) Unwrap() error { return e.Err }
