package bench

import (
	"fmt"
	"runtime"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/journal"
)

// OptionError is an option that makes no sense, or that this version lacks.
type OptionError struct{ Option, Problem string }

func (e *OptionError) Error() string { return e.Option + ": " + e.Problem }

// PollOff is the Poll of a pair that sleeps at once; 0 leaves it the mirror's
// own choice.
const PollOff = time.Duration(-1)

// CommitOptions say what [Commit] measures.
type CommitOptions struct {
	Size        int // bytes of a transaction
	Committers  int // each has one commit outstanding
	Ack         nvmmirror.Ack
	Transport   Transport
	Connections int
	Poll        time.Duration // before a wait sleeps
	Placement   Placement     // of the two nodes; "" is Auto
	RegionSize  int64         // of the volume
	JournalSize int64
	Duration    time.Duration // of the commits; the floor comes on top
	Dir         string        // where the regions go
	Program     []string      // runs [ServeChild]
	// Profile, if not "", is where CPU profiles of the run go, the floor
	// included: to Profile.primary and Profile.secondary.
	Profile string
}

const maxPoll = time.Second

// Check finds what [Commit] would refuse.
func (o *CommitOptions) Check() error {
	const block = 4096
	bad := func(option, format string, args ...any) error {
		return &OptionError{option, fmt.Sprintf(format, args...)}
	}
	switch {
	case o.Size < 1:
		return bad("size", "%d bytes is not a transaction", o.Size)
	case o.Committers < 1:
		return bad("committers", "%d is not at least 1", o.Committers)
	case o.Ack != nvmmirror.AckBoth && o.Ack != nvmmirror.AckAsync:
		return bad("ack", "%q is not both or async", o.Ack)
	case o.Transport != MD5Sig && o.Transport != TLS && o.Transport != Plain:
		return bad("transport", "%q is not md5sig, tls or plain, the pair's transports", o.Transport)
	case o.Connections < 1 || o.Connections > 16:
		return bad("connections", "%d is not from 1 to 16", o.Connections)
	case o.Poll > maxPoll || o.Poll < 0 && o.Poll != PollOff:
		return bad("poll", "%v is not auto, off, or from 0s to %v", o.Poll, maxPoll)
	case !o.Placement.known():
		return bad("placement", "%q is not auto, apart, together or free", o.Placement)
	case o.RegionSize < block || o.RegionSize%block != 0:
		return bad("region-size", "%d is not a positive multiple of %d bytes", o.RegionSize, block)
	case o.JournalSize < nvmmirror.MinJournal || o.JournalSize%nvmmirror.MinJournal != 0:
		return bad("journal-size", "%d is not a positive multiple of %d bytes", o.JournalSize, nvmmirror.MinJournal)
	case o.Size > journal.MaxSegment(o.JournalSize)-journal.HeaderSize-journal.RecordHeaderSize:
		return bad("size", "%d bytes are more than one transaction takes with a journal of %d", o.Size, o.JournalSize)
	case o.RegionSize/int64(o.Committers) < int64(o.Size):
		return bad("size", "%d committers of %d bytes do not fit into a region of %d", o.Committers, o.Size, o.RegionSize)
	case o.Duration < time.Millisecond:
		return bad("duration", "%v is shorter than a millisecond", o.Duration)
	}
	return nil
}

// PairTransports are those that a pair can have.
func PairTransports() []Transport {
	return slices.DeleteFunc(Transports(), func(t Transport) bool {
		o := CommitOptions{
			Size: 1, Committers: 1, Ack: nvmmirror.AckBoth, Transport: t, Connections: 1,
			RegionSize: 1 << 20, JournalSize: nvmmirror.MinJournal, Duration: time.Second,
		}
		return o.Check() != nil
	})
}

// placement is what Auto stands for.
func (o *CommitOptions) placement() Placement {
	switch {
	case o.Placement != Auto && o.Placement != "":
		return o.Placement
	case o.Committers == 1 && o.Connections == 1 && runtime.NumCPU() > 1:
		return Apart
	}
	return Free
}

// ping is the floor's round trip. Where both ends share a processor, one that polls
// keeps the other from answering, and the mirror's waits sleep soon.
func (o *CommitOptions) ping() work {
	poll := o.Poll != PollOff && o.placement() != Together && runtime.NumCPU() > 1
	return work{Size: o.Size, Poll: poll, Verify: VerifyNone}
}

func (o *CommitOptions) profile(node int) string {
	if o.Profile == "" {
		return ""
	}
	return o.Profile + [...]string{".primary", ".secondary"}[node]
}

// room says whether both regions fit into the directory's file system.
func (o *CommitOptions) room() error {
	var fs unix.Statfs_t
	if err := unix.Statfs(o.Dir, &fs); err != nil {
		return fmt.Errorf("%s: %w", o.Dir, err)
	}
	const around = 16 << 20 // metadata and alignment
	need := 2 * (o.RegionSize + o.RegionSize/256 + o.JournalSize + around)
	// A tmpfs without a limit has no blocks.
	if free := int64(fs.Bavail) * int64(fs.Bsize); fs.Blocks != 0 && free < need {
		return fmt.Errorf("%s has %d MiB free, two regions need %d MiB: choose a smaller --region-size or another --dir", o.Dir, free>>20, need>>20)
	}
	return nil
}

// plan cuts a run into rounds: commits, then the floor.
type plan struct {
	rounds                int
	commits, ping, stream time.Duration // of each
}

func (o *CommitOptions) plan() plan {
	n := int(o.Duration / (500 * time.Millisecond))
	p := plan{rounds: min(max(n, 2), 40)}
	p.commits = o.Duration / time.Duration(p.rounds)
	p.ping = min(p.commits, 300*time.Millisecond)
	p.stream = min(p.commits, 150*time.Millisecond)
	return p
}
