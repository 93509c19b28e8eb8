package journal

import (
	"sync"
	"sync/atomic"
)

// Write is one write of a transaction: Data goes to Off of the volume.
type Write struct {
	Off  int64
	Data []byte
}

// Request is one transaction on its way through a [Committer]. Get one with
// [NewRequest]; [Committer.Commit] takes it over.
type Request struct {
	writes []Write
	size   int // bytes of records

	// Guarded by the committer's mutex, except that the driver reads what
	// only it writes.
	state   state
	driver  bool // its caller has the driver's role, or the role is in wake
	leaving bool // its caller goes as soon as it is written
	err     error
	end     LSN
	wake    chan struct{} // capacity 1: done, or driver, or left

	inline [4]Write
	gen    atomic.Uint64
}

type state uint8

const (
	queued    state = iota // not written: can still be withdrawn
	taken                  // the driver reads the caller's buffers
	written                // in the log, not yet acknowledged
	done                   // end or err is set
	abandoned              // written, and its caller is gone
)

var requests = sync.Pool{New: func() any { return &Request{wake: make(chan struct{}, 1)} }}

// NewRequest is an empty transaction.
func NewRequest() *Request {
	r := requests.Get().(*Request)
	r.writes = r.inline[:0]
	return r
}

// Add adds a write. The data is read until Commit returns, not copied.
func (r *Request) Add(off int64, data []byte) {
	r.writes = append(r.writes, Write{off, data})
	r.size += recordSize(len(data))
}

// Size is the transaction's size in the log, its segment's header excluded.
func (r *Request) Size() int { return r.size }

// Empty reports whether it has no write.
func (r *Request) Empty() bool { return len(r.writes) == 0 }

// Free gives the request back. It must not be used after.
func (r *Request) Free() {
	r.gen.Add(1)
	clear(r.writes)
	clear(r.inline[:])
	r.writes, r.size = nil, 0
	r.state, r.driver, r.leaving, r.err, r.end = queued, false, false, nil, 0
	requests.Put(r)
}

// Generation changes when the request is committed and when it is freed: a
// handle that remembers it can tell that its request is over.
func (r *Request) Generation() uint64 { return r.gen.Load() }
