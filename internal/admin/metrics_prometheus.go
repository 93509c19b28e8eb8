package admin

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/nvmmirror/nvmmirror"
	"github.com/nvmmirror/nvmmirror/replicate/transport"
)

// metricsHandler serves the volume's figures to Prometheus.
func (s *Server) metricsHandler() http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(newCollector(s.volume))
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4, ErrorHandling: promhttp.ContinueOnError})
}

// collector reads the status once for each scrape.
type collector struct {
	status func() nvmmirror.Status
	descs  map[string]*prometheus.Desc
}

func newCollector(status func() nvmmirror.Status) *collector {
	c := &collector{status, map[string]*prometheus.Desc{}}
	for _, list := range [][]metric{metrics, kernelMetrics} {
		for _, m := range list {
			c.descs[m.name] = prometheus.NewDesc(m.name, m.help, nil, nil)
		}
	}
	c.descs[transportMetric] = prometheus.NewDesc(transportMetric, "1 for the transport to the peer; none on a standalone node.", []string{"transport"}, nil)
	c.descs[peerMetric] = prometheus.NewDesc(peerMetric, "1 for the state that the peer is in, 0 for each other.", []string{"state"}, nil)
	return c
}

// The metrics with a label.
const (
	transportMetric = "nvmmirror_transport_info"
	peerMetric      = "nvmmirror_peer_state"
)

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range c.descs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	s := c.status()
	c.emit(ch, metrics, &s, nil)
	if s.Transport != "" {
		ch <- prometheus.MustNewConstMetric(c.descs[transportMetric], prometheus.GaugeValue, 1, s.Transport)
	}
	for _, state := range peerStates {
		ch <- prometheus.MustNewConstMetric(c.descs[peerMetric], prometheus.GaugeValue, truth(s.Peer == state), string(state))
	}
	k, err := transport.ReadCounters()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(c.descs[kernelMetrics[0].name], err)
		return
	}
	c.emit(ch, kernelMetrics, nil, &k)
}

func (c *collector) emit(ch chan<- prometheus.Metric, list []metric, s st, k kc) {
	for _, m := range list {
		kind := prometheus.GaugeValue
		if m.counts {
			kind = prometheus.CounterValue
		}
		ch <- prometheus.MustNewConstMetric(c.descs[m.name], kind, m.of(s, k))
	}
}
