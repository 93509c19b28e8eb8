package main

import (
	"fmt"
	"runtime"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// The kernel's structures for asynchronous I/O, include/uapi/linux/aio_abi.h,
// little-endian.
type iocb struct {
	data   uint64
	_      uint64 // key and flags
	opcode uint16
	_      int16 // priority
	fd     uint32
	buf    uint64
	length uint64
	offset int64
	_      [2]uint64 // reserved, flags, eventfd
}

type ioEvent struct {
	data, obj uint64
	res, res2 int64
}

const iocbPwrite = 1 // IOCB_CMD_PWRITE

// several keeps depth writes with the kernel, from one thread: the cheapest
// client that there is for a block device.
func (w *writer) several(depth int) error {
	var ctx uintptr
	if _, _, errno := unix.Syscall(unix.SYS_IO_SETUP, uintptr(depth), uintptr(unsafe.Pointer(&ctx)), 0); errno != 0 {
		return fmt.Errorf("io_setup: %w", errno)
	}
	defer unix.Syscall(unix.SYS_IO_DESTROY, ctx, 0, 0)
	requests := make([]iocb, depth)
	begun := make([]time.Duration, depth)
	events := make([]ioEvent, depth)
	ready := make([]int, depth) // to be submitted
	for i := range ready {
		ready[i] = i
	}
	submit := make([]*iocb, 0, depth)
	for flying := 0; ; {
		submit = submit[:0]
		now := time.Since(w.start)
		for _, i := range ready {
			b := w.data[i*block:][:block]
			requests[i] = iocb{data: uint64(i), opcode: iocbPwrite, fd: uint32(w.fd),
				buf: uint64(uintptr(unsafe.Pointer(&b[0]))), length: block, offset: w.next(b)}
			begun[i] = now
			submit = append(submit, &requests[i])
		}
		if now > w.end {
			submit = submit[:0]
			if flying == 0 {
				return nil
			}
		}
		for rest := submit; len(rest) > 0; {
			n, _, errno := unix.Syscall(unix.SYS_IO_SUBMIT, ctx, uintptr(len(rest)), uintptr(unsafe.Pointer(&rest[0])))
			if errno != 0 {
				return fmt.Errorf("io_submit: %w", errno)
			}
			rest = rest[n:]
			flying += int(n)
		}
		n, _, errno := unix.Syscall6(unix.SYS_IO_GETEVENTS, ctx, 1, uintptr(depth), uintptr(unsafe.Pointer(&events[0])), 0, 0)
		if errno == unix.EINTR {
			ready = ready[:0]
			continue
		}
		if errno != 0 {
			return fmt.Errorf("io_getevents: %w", errno)
		}
		now = time.Since(w.start)
		ready = ready[:0]
		for _, e := range events[:n] {
			if e.res != block {
				return fmt.Errorf("write at %d: %d", requests[e.data].offset, e.res)
			}
			w.latencies = append(w.latencies, now-begun[e.data])
			ready = append(ready, int(e.data))
		}
		flying -= int(n)
		runtime.KeepAlive(requests)
	}
}
