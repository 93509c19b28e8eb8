package replicate

import (
	"errors"
	"fmt"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
)

// A block that fails its checksum is fetched from the peer: either node asks,
// the other answers with the block, what its table says of it, and the LSN up
// to which its data holds the log. The asker judges whether that is the state
// that it lacks.

// RequestBlock asks the peer for a block; the node's Repaired gets the answer.
// It is an error where no peer is there to answer.
func (p *Pair) RequestBlock(block uint32) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.phase != phaseInSync {
		return errors.New("no peer in sync to fetch it from")
	}
	p.wanted = append(p.wanted, block)
	p.poke()
	return nil
}

// sendRepairRequests queues what RequestBlock asked for.
func (p *Pair) sendRepairRequests(s *session) {
	p.mu.Lock()
	wanted := p.wanted
	p.wanted = nil
	p.mu.Unlock()
	for _, b := range wanted {
		s.send(message{typ: msgBlockRequest, a: uint64(b)}, nil)
	}
}

// failRepairs answers what no session will answer any more.
func (p *Pair) failRepairs() {
	p.mu.Lock()
	wanted := p.wanted
	p.wanted = nil
	p.mu.Unlock()
	for _, b := range wanted {
		p.node.Repaired(b, nil, BlockInfo{}, 0, errors.New("the connection to the peer was lost"))
	}
}

// sendBlock answers a msgBlockRequest.
func (p *Pair) sendBlock(s *session, block uint32) {
	if int64(block) >= p.node.Geometry().Size/BlockSize {
		s.send(message{typ: msgBlockMissing, a: uint64(block)}, []byte("no such block"))
		return
	}
	var info [1]BlockInfo
	buf := make([]byte, blockInfoSize+BlockSize)
	applied, err := p.node.ReadBlocks(block, buf[blockInfoSize:], info[:])
	if err != nil {
		s.send(message{typ: msgBlockMissing, a: uint64(block)}, []byte(err.Error()))
		return
	}
	putBlockInfo(buf, info[0])
	s.send(message{typ: msgBlocks, a: uint64(block), b: 1, c: uint64(applied)}, buf)
}

// takeRepair takes the answer to a msgBlockRequest.
func (p *Pair) takeRepair(m *message, body []byte) error {
	if m.typ == msgBlockMissing {
		p.node.Repaired(uint32(m.a), nil, BlockInfo{}, 0, fmt.Errorf("the peer cannot help: %s", body))
		return nil
	}
	if m.b != 1 || len(body) != blockInfoSize+BlockSize || m.a >= uint64(p.node.Geometry().Size/BlockSize) {
		return &WireError{fmt.Sprintf("%d blocks from %d in answer to a request for one", m.b, m.a)}
	}
	info, data := getBlockInfo(body), body[blockInfoSize:]
	if crc32c.Sum(data) != info.CRC {
		return &WireError{fmt.Sprintf("block %d does not match the checksum beside it", m.a)}
	}
	p.node.Repaired(uint32(m.a), data, info, journal.LSN(m.c), nil)
	return nil
}
