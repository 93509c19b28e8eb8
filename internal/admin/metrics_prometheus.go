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
	reg.MustRegister(newCollector(s.o.Volume))
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4, ErrorHandling: promhttp.ContinueOnError})
}

// collector reads the status once for each scrape.
type collector struct {
	v     *nvmmirror.Volume
	descs map[string]*prometheus.Desc
}

func newCollector(v *nvmmirror.Volume) *collector {
	c := &collector{v, map[string]*prometheus.Desc{}}
	for _, list := range [][]metric{metrics, kernelMetrics} {
		for _, m := range list {
			c.descs[m.name] = prometheus.NewDesc(m.name, m.help, nil, nil)
		}
	}
	c.descs[transportMetric] = prometheus.NewDesc(transportMetric, "1 for the transport to the peer; none on a standalone node.", []string{"transport"}, nil)
	return c
}

// transportMetric is the one with a label.
const transportMetric = "nvmmirror_transport_info"

// Describe implements prometheus.Collector.
func (c *collector) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range c.descs {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (c *collector) Collect(ch chan<- prometheus.Metric) {
	s := c.v.Status()
	c.emit(ch, metrics, &s, nil)
	if s.Transport != "" {
		ch <- prometheus.MustNewConstMetric(c.descs[transportMetric], prometheus.GaugeValue, 1, s.Transport)
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
