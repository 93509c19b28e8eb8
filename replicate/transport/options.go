package transport

import "time"

// Options tune the connections of a transport. The zero value is usable.
type Options struct {
	// UserTimeout is TCP_USER_TIMEOUT: a connection whose sent bytes stay
	// unacknowledged that long fails with ETIMEDOUT. A peer that vanished
	// answers nothing under MD5, not even a reset, so without it a write
	// would hang for the kernel's 15 minutes. 0: 10 s.
	UserTimeout time.Duration
}

func (o Options) withDefaults() Options {
	if o.UserTimeout <= 0 {
		o.UserTimeout = 10 * time.Second
	}
	return o
}
