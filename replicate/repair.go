package replicate

import (
	"errors"
	"fmt"
	"slices"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem"
)

// A block that fails its checksum is fetched from the peer: either node asks,
// the other answers with the block, what its table says of it, and the LSN up
// to which its data holds the log. The asker judges whether that is the state
// that it lacks.

// OwnCopyError: log that is to be sent is damaged in this node's own memory.
type OwnCopyError struct {
	LSN journal.LSN
	Err error
}

func (e *OwnCopyError) Error() string {
	return fmt.Sprintf("the segment at LSN %d is not whole in this node's persistent memory, it cannot be sent: %v", e.LSN, e.Err)
}

func (e *OwnCopyError) Unwrap() error { return e.Err }

// noteOwnDamage decides what follows from damage to log that the peer lacks.
// Where the data holds that log, the data is whole: the next handshake finds
// that the journal does not reach back, and copies it. Else the segment is
// nowhere: this node ends, and its next recovery cuts the log off there.
func (p *Pair) noteOwnDamage(e *OwnCopyError) {
	if e.LSN < p.node.Applied() {
		p.unsound = max(p.unsound, e.LSN+1)
		then := "the peer is copied to in full"
		if p.Role() != Primary {
			then = "the primary cannot be repaired from it"
		}
		p.log.Error("log to be sent is damaged here, or was never here: older than a full copy; "+then, zap.Error(e))
		return
	}
	p.node.Fail(fmt.Errorf("%w; it was not acknowledged: restart the node, so that it recovers with its peer", e))
}

// noteFault ends the node where a session ended because a page of its mapping
// is gone. The kernel says so by EFAULT where it was to send from it.
func (p *Pair) noteFault(err error) {
	if fault := new(pmem.FaultError); errors.As(err, &fault) || errors.Is(err, unix.EFAULT) {
		p.node.Fail(fmt.Errorf("the journal cannot be read: %w", err))
	}
}

// RequestBlock asks the peer for a block; the node's Repaired gets the answer.
// It is an error where no peer is there to answer.
func (p *Pair) RequestBlock(block int64) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.phase != PhaseInSync {
		return errors.New("no peer in sync to fetch it from")
	}
	if !slices.Contains(p.wanted, block) && !slices.Contains(p.asked, block) {
		p.wanted = append(p.wanted, block)
		p.poke()
	}
	return nil
}

// repairing reports whether a block that was asked for has not come yet.
func (p *Pair) repairing() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.asked) > 0
}

// mostAsked is how many blocks are asked for at a time: a quarter of the answers that
// the peer lets wait to be sent.
const mostAsked = maxQueued / 4 / (blockInfoSize + BlockSize)

// sendRepairRequests queues some of what RequestBlock asked for.
func (p *Pair) sendRepairRequests(s *session) {
	p.mu.Lock()
	n := min(len(p.wanted), max(0, mostAsked-len(p.asked)))
	wanted := p.wanted[:n:n]
	p.asked = append(p.asked, wanted...)
	p.wanted = p.wanted[n:]
	p.mu.Unlock()
	for _, b := range wanted {
		s.send(message{typ: msgBlockRequest, a: uint64(b)}, nil)
	}
}

// failRepairs answers what no session will answer any more.
func (p *Pair) failRepairs() {
	p.mu.Lock()
	wanted := append(p.asked, p.wanted...)
	p.asked, p.wanted = nil, nil
	p.mu.Unlock()
	for _, b := range wanted {
		p.node.Repaired(b, nil, BlockInfo{}, 0, errors.New("the connection to the peer was lost"))
	}
}

// sendBlock answers a msgBlockRequest.
func (p *Pair) sendBlock(s *session, block uint64) {
	s.helping.Store(soonLooks)
	if block >= uint64(p.node.Geometry().Size/BlockSize) {
		s.send(message{typ: msgBlockMissing, a: block}, []byte("no such block"))
		return
	}
	var info [1]BlockInfo
	buf := make([]byte, blockInfoSize+BlockSize)
	applied, err := p.node.ReadBlocks(int64(block), buf[blockInfoSize:], info[:])
	if err != nil {
		m, body := message{typ: msgBlockMissing, a: block, c: uint64(applied)}, []byte(nil)
		if info[0] != (BlockInfo{}) {
			m.b, body = 1, putBlockInfo(make([]byte, blockInfoSize), info[0])
		}
		s.send(m, append(body, err.Error()...))
		return
	}
	putBlockInfo(buf, info[0])
	s.send(message{typ: msgBlocks, a: block, b: 1, c: uint64(applied)}, buf)
}

// takeRepair takes the answer to a msgBlockRequest.
func (p *Pair) takeRepair(m *message, body []byte) error {
	p.mu.Lock()
	if i := slices.Index(p.asked, int64(m.a)); i >= 0 {
		p.asked = slices.Delete(p.asked, i, i+1)
	}
	if len(p.wanted) > 0 {
		p.poke() // there is room for more
	}
	p.mu.Unlock()
	if m.a >= uint64(p.node.Geometry().Size/BlockSize) {
		return &WireError{fmt.Sprintf("an answer about block %d, of which there is none", m.a)}
	}
	if m.typ == msgBlockMissing {
		var info BlockInfo
		if m.b == 1 && len(body) >= blockInfoSize {
			info, body = getBlockInfo(body), body[blockInfoSize:]
		}
		p.node.Repaired(int64(m.a), nil, info, journal.LSN(m.c), fmt.Errorf("the peer cannot help: %s", printable(body)))
		return nil
	}
	if m.b != 1 || len(body) != blockInfoSize+BlockSize {
		return &WireError{fmt.Sprintf("%d blocks from %d in answer to a request for one", m.b, m.a)}
	}
	info, data := getBlockInfo(body), body[blockInfoSize:]
	if crc32c.Sum(data) != info.CRC {
		return &WireError{fmt.Sprintf("block %d does not match the checksum beside it", m.a)}
	}
	p.node.Repaired(int64(m.a), data, info, journal.LSN(m.c), nil)
	return nil
}
