// Package bench measures the mirror and the wire under it: commits of a real
// pair in two processes, raw sockets between the same two processes in the
// same run, and transports against each other.
//
// # Processes
//
//	driver                                   other end
//	+------------------------+  control     +------------------------+
//	| Commit, Wire           |--JSON lines->| Serve                  |
//	| one thread per         |              | one thread per         |
//	| connection             |==data=======>| connection             |
//	+------------------------+              +------------------------+
//
// The other end is a child of the driver, with its standard input and output
// as control connection, or a server on another host. It does what it is told
// and knows nothing of the measurement's plan.
//
// # What is sent
//
// A message is a piece of a pseudo-random pattern that both ends make from the
// same seed; where the piece starts depends on the message's number, so that a
// lost, doubled or stale one differs. The pattern has no zero byte: a message
// that starts with one is the last.
package bench
