package nvmmirror

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"github.com/nvmmirror/nvmmirror/internal/crc32c"
	"github.com/nvmmirror/nvmmirror/journal"
	"github.com/nvmmirror/nvmmirror/pmem/sim"
	"github.com/nvmmirror/nvmmirror/replicate"
)

// simSeed is printed by every test that uses it; NVMMIRROR_SEED replays it.
func simSeed(t testing.TB) *rand.Rand {
	seed := uint64(20261122)
	if s := os.Getenv("NVMMIRROR_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("NVMMIRROR_SEED=%d", seed)
	return rand.New(rand.NewPCG(seed, 1))
}

// simWorld is a standalone volume on simulated memory and its model: what the
// volume holds after each transaction.
type simWorld struct {
	t      testing.TB
	rng    *rand.Rand
	mem    *sim.Memory
	v      *Volume
	states [][]byte    // content after so many transactions
	ends   map[LSN]int // log end → transactions
	acked  int
	broken error // the first promise that a crash broke
	every  int   // of the crash points at stores, one in so many is tried
	images int   // at each point at most
	tried  int
	quiet  bool // no crash points: to move on in the ring

	// While a full copy arrives: what it is to become.
	incoming []byte
	// While log is damaged: what is left when it has been given up.
	lossy bool
	left  []byte
}

const simSize = 16 * blockSize

func newSimWorld(t testing.TB, rng *rand.Rand, mutant func(sim.Op) bool) *simWorld {
	m := layout(simSize, MinJournal)
	mem, err := sim.New(m.Data.end())
	if err != nil {
		t.Fatal(err)
	}
	w := &simWorld{t: t, rng: rng, mem: mem, states: [][]byte{make([]byte, simSize)}, ends: map[LSN]int{0: 0}, every: 150, images: 5}
	mem.Mutate(mutant)
	mem.OnOp(func(o sim.Op) { w.crash(o, true) })
	if err := format(mem, m); err != nil {
		t.Fatal(err)
	}
	w.formatted()
	w.open()
	return w
}

// formatted: from here on every crash leaves a region.
func (w *simWorld) formatted() {
	w.mem.OnOp(func(o sim.Op) { w.crash(o, false) })
}

func (w *simWorld) open() {
	o, _ := Options{}.withDefaults()
	v, err := openMemory("sim", w.mem, o)
	if err == nil {
		err = v.takeUp()
	}
	if err != nil {
		w.t.Fatal(err)
	}
	w.v = v
}

// kill is a process kill and a restart on what is visible.
func (w *simWorld) kill() {
	w.v.pair.Close()
	w.open()
}

// commit makes one random transaction, or receives it.
func (w *simWorld) commit() {
	next, tx := w.draw()
	how := w.v.committer.Commit
	if w.rng.IntN(3) == 0 {
		how = w.receive
	}
	w.take(next, tx, how)
}

// draw is a random transaction, and what the volume holds after it.
func (w *simWorld) draw() (next []byte, tx *journal.Request) {
	next = bytes.Clone(w.states[len(w.states)-1])
	tx = journal.NewRequest()
	for range 1 + w.rng.IntN(4) {
		n := 1 + w.rng.IntN(300)
		if w.quiet || w.rng.IntN(8) == 0 {
			n = 1 + w.rng.IntN(3*blockSize)
		}
		off := w.rng.IntN(simSize - n)
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(w.rng.Uint32())
		}
		copy(next[off:], p)
		tx.Add(int64(off), p)
	}
	return next, tx
}

// take makes a transaction, after which the volume holds next.
func (w *simWorld) take(next []byte, tx *journal.Request, how func(context.Context, *journal.Request) (LSN, error)) {
	w.states = append(w.states, next)
	lsn, err := how(context.Background(), tx)
	if err != nil {
		w.t.Fatal(err)
	}
	w.acked++
	w.ends[lsn] = w.acked
}

// receive makes a transaction as a secondary does that the peer sends it to:
// the segment comes whole, in pieces that are stored as they arrive.
func (w *simWorld) receive(_ context.Context, tx *journal.Request) (LSN, error) {
	defer tx.Free()
	log := w.v.journal
	peer := journal.NewLog(newHeapMemory(make([]byte, w.v.ring.Len)), 0, w.v.ring.Len, log.Ring().Base)
	peer.Reset(log.End(), log.Chain())
	peer.SetEpoch(log.Epoch())
	end, err := peer.Append([]*journal.Request{tx}, tx.Size(), LSN(0))
	if err != nil {
		return 0, err
	}
	var h journal.Header
	for at := log.End(); at < end; at = h.End() {
		if err := peer.Ring().Header(at, &h); err != nil {
			return 0, err
		}
		if h.Pad {
			log.PlacePad(&h)
			continue
		}
		p := peer.Ring().Raw(at, int(h.Length))
		for n := 0; n < len(p); {
			piece := min(len(p)-n, journal.Align*(1+w.rng.IntN(16)))
			log.Place(at+LSN(n), p[n:n+piece])
			n += piece
		}
	}
	if err := log.Fence(end, peer.Chain()); err != nil {
		return 0, err
	}
	return end, w.v.apply(end)
}

// crash tries what power failure, and a process kill with power failure after
// it, would leave before o is done.
func (w *simWorld) crash(o sim.Op, creating bool) {
	if w.broken != nil || w.quiet || o.Kind == sim.Store && w.rng.IntN(w.every) != 0 {
		return
	}
	images := w.images
	if creating || (w.incoming != nil || w.lossy) && o.Kind != sim.Store { // they happen once
		images *= 10
	}
	w.mem.Images(images, w.rng, func(img *sim.Memory) {
		w.tried++
		w.judge(o, img, creating)
	})
	if w.rng.IntN(4) == 0 && !w.lossy {
		w.mem.Kill(func(img *sim.Memory) { w.judgeKill(o, img, creating) })
	}
}

// judge recovers an image, once with a second crash inside recovery.
func (w *simWorld) judge(o sim.Op, img *sim.Memory, creating bool) {
	switch {
	case w.incoming != nil && w.rng.IntN(2) == 0: // few points, so each is tried hard
		w.crashWithin(img, 150, func() { w.recoverAndChange(img) })
	case w.rng.IntN(8) == 0:
		w.crashWithin(img, 200, func() { w.recover(img) })
	case w.rng.IntN(8) == 0:
		w.crashWithin(img, 500, func() { w.recoverAndChange(img) })
	}
	content, n, err := w.recover(img)
	switch {
	case w.broken != nil:
	case errors.Is(err, errInconsistent) && w.incoming != nil:
	case w.incoming != nil && err == nil && bytes.Equal(content, w.incoming):
	case w.lossy && (errors.Is(err, errDamaged) || err == nil && bytes.Equal(content, w.left)):
	case creating && errors.Is(err, errUnreadable): // no region yet
	case err != nil:
		w.broken = fmt.Errorf("%v %d at %s: recovery: %w", o.Kind, o.N, o.Site, err)
	case n < w.acked:
		w.broken = fmt.Errorf("%v %d at %s: %d transactions were acknowledged, %d recovered", o.Kind, o.N, o.Site, w.acked, n)
	case !bytes.Equal(content, w.states[n]):
		w.broken = fmt.Errorf("%v %d at %s: recovered content is not that after transaction %d", o.Kind, o.N, o.Site, n)
	}
}

// recover recovers an image and returns its content and how many transactions
// it holds. A transaction that has not returned has the highest end.
func (w *simWorld) recover(img *sim.Memory) (content []byte, n int, err error) {
	o, _ := Options{}.withDefaults()
	v, err := openMemory("image", img, o)
	if err != nil {
		return nil, 0, fmt.Errorf("%w: %w", errUnreadable, err)
	}
	if v.copying {
		return nil, 0, errInconsistent
	}
	if v.damage.Load() != nil {
		return nil, 0, errDamaged
	}
	content = bytes.Clone(img.Bytes()[v.data.Off : v.data.Off+simSize])
	n, ok := w.ends[v.Applied()]
	if !ok { // the transaction that has not returned, or only padding before it
		n = len(w.states) - 1
		if bytes.Equal(content, w.states[w.acked]) {
			n = w.acked
		}
	}
	for b := range int64(simSize / blockSize) {
		if e, ok := v.table.get(b); !ok {
			return nil, 0, fmt.Errorf("entry of block %d does not match its checksum", b)
		} else if sum := crcOf(v.block(b)); sum != e.crc {
			return nil, 0, fmt.Errorf("block %d does not match its checksum", b)
		}
	}
	return content, n, nil
}

var errUnreadable = errors.New("cannot be opened")

var errDamaged = errors.New("log is damaged")

var errInconsistent = errors.New("a full copy has not finished")

type stopped struct{}

// crashWithin lets f run up to a random operation on the image, and loses
// power there.
func (w *simWorld) crashWithin(img *sim.Memory, most int, f func()) {
	at := img.Ops() + w.rng.IntN(most)
	img.OnOp(func(o sim.Op) {
		if o.N >= at {
			panic(stopped{})
		}
	})
	func() {
		defer func() {
			if r := recover(); r != nil {
				if _, ok := r.(stopped); !ok {
					panic(r)
				}
			}
		}()
		f()
	}()
	img.OnOp(nil)
	img.Crash(w.rng)
}

// recoverAndChange recovers the image and changes its metadata.
func (w *simWorld) recoverAndChange(img *sim.Memory) {
	o, _ := Options{}.withDefaults()
	if v, err := openMemory("image", img, o); err == nil {
		v.updateMeta(func(m *metadata) error { m.State.Lease++; return nil })
	}
}

// judgeKill: the process is killed and recovered; what it then reports as
// persisted survives power failure right after.
func (w *simWorld) judgeKill(o sim.Op, img *sim.Memory, creating bool) {
	if !creating && w.incoming == nil && w.rng.IntN(2) == 0 {
		w.judgeKillAndChange(o, img)
		return
	}
	content, n, err := w.recover(img)
	if err != nil {
		if !creating && !(errors.Is(err, errInconsistent) && w.incoming != nil) {
			w.broken = fmt.Errorf("%v %d at %s: recovery after a kill: %w", o.Kind, o.N, o.Site, err)
		}
		return
	}
	img.Crash(w.rng)
	after, m, err := w.recover(img)
	switch {
	case err != nil:
		w.broken = fmt.Errorf("%v %d at %s: recovery after a kill and a power failure: %w", o.Kind, o.N, o.Site, err)
	case m != n || !bytes.Equal(content, after):
		w.broken = fmt.Errorf("%v %d at %s: %d transactions recovered after a kill, %d after the power failure that followed", o.Kind, o.N, o.Site, n, m)
	}
}

// judgeKillAndChange: the process is killed, the next one opens the region,
// which repairs metadata, and changes it, and power fails during one of these.
func (w *simWorld) judgeKillAndChange(at sim.Op, img *sim.Memory) {
	o, _ := Options{}.withDefaults()
	var v *Volume
	var err error
	open := func() { v, err = openMemory("image", img, o) }
	if c, e := readMetadata(img); e == nil && c.repair {
		w.crashWithin(img, 40, open)
	} else if open(); err == nil {
		w.crashWithin(img, 60, func() { v.updateMeta(func(m *metadata) error { m.State.Lease++; return nil }) })
	}
	n := 0
	if err == nil {
		_, n, err = w.recover(img)
	}
	if err != nil || n < w.acked {
		w.broken = fmt.Errorf("%v %d at %s: recovery after a kill, a change of metadata and a power failure: %d transactions of %d: %w", at.Kind, at.N, at.Site, n, w.acked, err)
	}
}

// run is the workload: commits with wrap-around, checkpoints, kills, a clean
// close.
func (w *simWorld) run(transactions int) {
	for i := 1; i <= transactions && w.broken == nil; i++ {
		w.quiet = w.rng.IntN(3) > 0
		w.commit()
		switch {
		case i%97 == 0:
			w.kill()
		case w.v.checkpointDue() || w.rng.IntN(20) == 0:
			if err := w.v.checkpoint(false); err != nil {
				w.t.Fatal(err)
			}
		}
	}
	w.quiet = false
	if w.broken == nil {
		if err := w.v.Close(); err != nil {
			w.t.Fatal(err)
		}
		w.open()
		w.commit()
	}
	if w.broken == nil {
		w.lose()
	}
	if w.broken == nil {
		w.copyOver()
	}
	w.v.pair.Close()
	w.mem.OnOp(nil)
}

// lose damages log that was acknowledged, and gives it up, as an operator forces
// it: what the blocks hold by then stays, and nothing of it may go afterwards.
func (w *simWorld) lose() {
	var hurt LSN
	for i := range 5 {
		if i == 2 {
			hurt = w.v.journal.End()
		}
		next, tx := w.draw()
		w.take(next, tx, w.v.committer.Commit) // with hints that prove it
	}
	w.v.pair.Close()
	w.mem.Bytes()[w.v.ring.Off+int64(w.v.journal.Ring().Position(hurt))+20] ^= 1
	w.lossy = true
	o, _ := Options{}.withDefaults()
	v, err := openMemory("sim", w.mem, o)
	if err != nil || v.damage.Load() == nil {
		w.t.Fatal("the log is not damaged: ", err)
	}
	w.v = v
	w.left = bytes.Clone(w.v.mem.Bytes()[w.v.data.Off:][:simSize])
	if err := (*node)(w.v).AcceptLoss(func(*replicate.State) error { return nil }); err != nil {
		w.t.Fatal(err)
	}
	w.states, w.ends, w.acked = [][]byte{w.left}, map[LSN]int{w.v.journal.End(): 0}, 0
	w.lossy = false
	if err := w.v.takeUp(); err != nil {
		w.t.Fatal(err)
	}
	if err := w.v.checkpoint(false); err != nil {
		w.t.Fatal(err)
	}
}

// copyOver makes the node the target of a full copy that a lost connection cuts off once,
// with log behind it.
func (w *simWorld) copyOver() {
	w.v.pair.Close()
	n := (*node)(w.v)
	data := make([]byte, simSize)
	for i := range data {
		data[i] = byte(w.rng.Uint32())
	}
	w.incoming = data
	r := replicate.Resync{Fork: w.v.journal.End() + 1<<20, Chain: 77, Epoch: journal.Epoch{Counter: w.v.meta.State.History.Last().Epoch.Counter + 99, Node: 7}}
	history := w.v.meta.State.History.Append(journal.Entry{Epoch: r.Epoch, Start: r.Fork, PeerIn: true})
	start := func(resume bool) {
		err := n.StartCopy(r, resume, func(st *replicate.State) {
			st.History = history
			st.Role, st.Title = replicate.Secondary, false
		})
		if err != nil {
			w.t.Fatal(err)
		}
	}
	start(false)
	info := make([]replicate.BlockInfo, simSize/blockSize)
	for b := range info {
		info[b] = replicate.BlockInfo{LSN: r.Fork - 64, CRC: crcOf(data[b*blockSize:][:blockSize])}
	}
	half := len(info) / 2
	for i, part := range [][2]int{{0, half}, {half, len(info)}} {
		if i > 0 {
			r.Fork += 4096
			start(true)
		}
		if err := n.CopyBlocks(int64(part[0]), data[part[0]*blockSize:part[1]*blockSize], info[part[0]:part[1]]); err != nil {
			w.t.Fatal(err)
		}
	}
	if err := n.FinishCopy(); err != nil {
		w.t.Fatal(err)
	}
	// The old content must never come back.
	w.incoming = nil
	w.states, w.ends, w.acked = [][]byte{data}, map[LSN]int{r.Fork: 0}, 0
	if err := w.v.checkpoint(false); err != nil {
		w.t.Fatal(err)
	}
}

func TestCrashEverywhere(t *testing.T) {
	t.Parallel()
	n := 400
	if testing.Short() {
		n = 100
	}
	w := newSimWorld(t, simSeed(t), nil)
	defer w.mem.Close()
	w.run(n)
	if w.broken != nil {
		t.Fatal(w.broken)
	}
	t.Logf("%d operations, %d crash images recovered, log end %d in a ring of %d", w.mem.Ops(), w.tried, w.v.journal.End(), MinJournal)
	if w.v.journal.End() < MinJournal && !testing.Short() {
		t.Fatal("the ring never wrapped")
	}
}

func crcOf(p []byte) uint32 { return crc32c.Sum(p) }
