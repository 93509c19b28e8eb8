package bench

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"runtime/pprof"
	"time"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// peerTimeout is long: a machine that stalls for a second is not a lost peer
// here.
const peerTimeout = 5 * time.Second

// nodeJob is how a node of a pair is to be opened.
type nodeJob struct {
	Region    string        `json:"region"`
	Listen    string        `json:"listen"`
	Peer      string        `json:"peer"`
	Transport Transport     `json:"transport"`
	Key       []byte        `json:"key"`
	Ack       nvmmirror.Ack `json:"ack"`
	Poll      time.Duration `json:"poll"`  // as nvmmirror.Peer.BusyPoll
	Lanes     int           `json:"lanes"` // as nvmmirror.Peer.Connections
	Profile   string        `json:"profile,omitempty"`
	TLSKey    string        `json:"tls_key,omitempty"` // files, as in the daemon's configuration
	TLSPeer   string        `json:"tls_peer,omitempty"`
}

func (j nodeJob) open() (*nvmmirror.Volume, error) {
	peer := &nvmmirror.Peer{Listen: j.Listen, Address: j.Peer, Key: j.Key, Timeout: peerTimeout, BusyPoll: j.Poll, Connections: j.Lanes}
	a, err := netip.ParseAddrPort(j.Peer)
	if err != nil {
		return nil, err
	}
	o := transport.Options{UserTimeout: peerTimeout}
	switch j.Transport {
	case MD5Sig:
	case TLS:
		key, err := transport.LoadTLSKey(j.TLSKey)
		if err != nil {
			return nil, err
		}
		pin, err := transport.LoadPin(j.TLSPeer)
		if err != nil {
			return nil, err
		}
		if peer.Transport, err = transport.NewTLS(a.Addr(), key, pin, o); err != nil {
			return nil, err
		}
	case Plain:
		if peer.Transport, err = transport.NewPlain(a.Addr(), o); err != nil {
			return nil, err
		}
	default:
		return nil, fmt.Errorf("a pair has no transport %s", j.Transport)
	}
	return nvmmirror.Open(j.Region, nvmmirror.Options{Ack: j.Ack, Peer: peer})
}

// profile starts a CPU profile, if one is wanted; end ends it.
func (j nodeJob) profile() (end func() error, err error) {
	if j.Profile == "" {
		return func() error { return nil }, nil
	}
	f, err := os.Create(j.Profile)
	if err != nil {
		return nil, err
	}
	if err := pprof.StartCPUProfile(f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() error {
		pprof.StopCPUProfile()
		return f.Close()
	}, nil
}

// secondary is the node in the child.
type secondary struct {
	v        *nvmmirror.Volume
	path     string
	profiled func() error
}

// nodeState is what the driver asks of the secondary.
type nodeState struct {
	Peer     string        `json:"peer"`
	Applied  nvmmirror.LSN `json:"applied"`
	Usage    usage         `json:"usage"`
	Resident int64         `json:"resident,omitempty"`
}

func openSecondary(j nodeJob) (*secondary, error) {
	v, err := j.open()
	if err != nil {
		return nil, err
	}
	profiled, err := j.profile()
	if err != nil {
		return nil, errors.Join(err, v.Close())
	}
	return &secondary{v, j.Region, profiled}, nil
}

func (s *secondary) state(memory bool) (n nodeState, err error) {
	if n.Usage, err = used(); err != nil {
		return n, err
	}
	st := s.v.Status()
	n.Peer, n.Applied = string(st.Peer), st.Applied
	if memory { // after the usage, of which it takes a lot
		n.Resident, err = residentBeside(s.path)
	}
	return n, err
}

func (s *secondary) close() error { return errors.Join(s.profiled(), s.v.Close()) }

// await asks until f is done.
func await(ctx context.Context, what string, f func() (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, stateTime)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for {
		if done, err := f(); done || err != nil {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("the pair is not %s: %w", what, ctx.Err())
		}
	}
}

const stateTime = 20 * time.Second // for a state to come about
