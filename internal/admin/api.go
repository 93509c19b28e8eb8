// Package admin is the daemon's admin interface: HTTP and JSON over a Unix
// socket, its server and its client.
//
//	GET  /v1/status
//	POST /v1/promote?force=true|false
//	POST /v1/continue-alone?force=true|false
//	POST /v1/demote
//	GET  /v1/wait?for=in-sync|connected&timeout=30s
//	PUT  /v1/data?offset=N&timeout=10s    the body is one transaction
//	GET  /v1/data?offset=N&length=L       at most MaxRead bytes, of one moment
//	GET  /v1/journal?mode=ls|dump|verify  JSON lines
//	GET  /metrics                         Prometheus
//
// An answer other than 2xx carries an [Error]; plain text where /metrics cannot
// gather, or has too many requests at a time. Durations are Go's, numbers decimal.
package admin

import (
	"errors"
	"fmt"
	"net/http"
	"time"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/journal"
)

// MaxRead is how many bytes one request reads.
const MaxRead = 4 << 20

// Kind says what an error means to the caller.
type Kind string

// The kinds of errors.
const (
	KindFailed         Kind = "failed"
	KindUsage          Kind = "usage"           // the request makes no sense
	KindRange          Kind = "range"           // it does not fit into the volume, or a transaction
	KindDenied         Kind = "denied"          // not for this user
	KindNotPrimary     Kind = "not-primary"     // only a primary does that
	KindOutcomeUnknown Kind = "outcome-unknown" // the transaction may or may not survive
	KindTimeout        Kind = "timeout"         // it did not come about in time
	KindDamage         Kind = "damage"          // checksums do not match
	KindRefused        Kind = "refused"         // it could lose data
	KindUnreachable    Kind = "unreachable"     // no daemon answers; made by the client
)

// Error is an error as it travels.
type Error struct {
	Kind    Kind   `json:"kind"`
	Message string `json:"error"`

	lost bool // made by the client: what the daemon did is not known
}

func newError(kind Kind, format string, args ...any) *Error {
	return &Error{Kind: kind, Message: fmt.Sprintf(format, args...)}
}

func (e *Error) Error() string { return e.Message }

// IsOutcomeUnknown reports whether a transaction may or may not survive.
func IsOutcomeUnknown(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Kind == KindOutcomeUnknown
}

// classify makes an Error of any error.
func classify(err error) *Error {
	var done *Error
	var notPrimary *nvmmirror.ErrNotPrimary
	var refused *nvmmirror.RefusedError
	var corrupt *nvmmirror.CorruptError
	var damage *journal.DamageError
	kind := KindFailed
	switch {
	case errors.As(err, &done):
		return done
	case errors.Is(err, nvmmirror.ErrOutcomeUnknown):
		kind = KindOutcomeUnknown
	case errors.As(err, &notPrimary):
		kind = KindNotPrimary
	case errors.As(err, &refused):
		kind = KindRefused
	case errors.As(err, &corrupt), errors.As(err, &damage):
		kind = KindDamage
	case errors.Is(err, nvmmirror.ErrTooLarge), errors.Is(err, nvmmirror.ErrOutOfRange):
		kind = KindRange
	}
	return newError(kind, "%v", err)
}

var httpStatus = map[Kind]int{
	KindFailed:         http.StatusInternalServerError,
	KindUsage:          http.StatusBadRequest,
	KindRange:          http.StatusRequestedRangeNotSatisfiable,
	KindDenied:         http.StatusForbidden,
	KindNotPrimary:     http.StatusMisdirectedRequest,
	KindOutcomeUnknown: http.StatusGatewayTimeout,
	KindTimeout:        http.StatusGatewayTimeout,
	KindDamage:         http.StatusInternalServerError,
	KindRefused:        http.StatusConflict,
}

// Status is the volume's state and the daemon's.
type Status struct {
	nvmmirror.Status
	Daemon Daemon `json:"daemon"`
}

// Daemon is what status shows beside the volume.
type Daemon struct {
	PID     int       `json:"pid"`
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	Config  string    `json:"config"`
	Socket  string    `json:"socket"`
	// Listen and Address are this node's end and the peer's, "" standalone.
	Listen    string `json:"listen,omitempty"`
	Address   string `json:"address,omitempty"`
	Timeout   string `json:"timeout,omitempty"`
	Heartbeat string `json:"heartbeat,omitempty"`
	ReadLease string `json:"read_lease,omitempty"`
	// MaxTransaction is how many bytes one write of its own may have.
	MaxTransaction int64 `json:"max_transaction"`
}

// maxTransaction is how many bytes a transaction of one write holds, in whole
// pages.
func maxTransaction(v *nvmmirror.Volume) int64 {
	const page = 4096
	room := journal.MaxSegment(v.Status().Journal) - journal.HeaderSize - journal.RecordHeaderSize
	return int64(room) &^ (page - 1)
}
