package daemon

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

var (
	buildInfo = prometheus.NewDesc("msbd_build_info", "A constant 1 that carries the version.", []string{"version"}, nil)
	keyCount  = prometheus.NewDesc("msbd_keys", "API keys, by their state.", []string{"state"}, nil)
	boxCount  = prometheus.NewDesc("msbd_sandboxes", "Sandboxes, by their state.", []string{"state"}, nil)
	degraded  = prometheus.NewDesc("msbd_degraded", "1 while the server refuses to change anything.", nil, nil)
	auditSize = prometheus.NewDesc("msbd_audit_entries", "Entries of the audit log.", nil, nil)
	certEnd   = prometheus.NewDesc("msbd_tls_certificate_expiry_timestamp_seconds", "When the gateway's certificate expires.", nil, nil)
)

// newMetrics returns what GET /metrics reports, to which the gateway and JSON-RPC add theirs.
func newMetrics(s *status) *prometheus.Registry {
	r := prometheus.NewRegistry()
	r.MustRegister(collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}), statusCollector{s})
	return r
}

// statusCollector reads the domain's state at each scrape.
type statusCollector struct{ *status }

// Describe implements prometheus.Collector.
func (statusCollector) Describe(out chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{buildInfo, keyCount, boxCount, degraded, auditSize, certEnd} {
		out <- d
	}
}

// Collect implements prometheus.Collector.
func (c statusCollector) Collect(out chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		out <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	gauge(buildInfo, 1, c.cfg.Version)
	keys := c.issuer.Counts()
	gauge(keyCount, float64(keys.Live), "live")
	gauge(keyCount, float64(keys.Expired), "expired")
	gauge(keyCount, float64(keys.Revoked), "revoked")
	boxes := map[sandbox.State]int{}
	for _, rec := range c.manager.List("") {
		boxes[rec.State]++
	}
	for _, state := range []sandbox.State{sandbox.Starting, sandbox.Running, sandbox.Stopping, sandbox.Failed} {
		gauge(boxCount, float64(boxes[state]), string(state))
	}
	_, reasons := c.now()
	gauge(degraded, min(1, float64(len(reasons))))
	gauge(auditSize, float64(c.store.AuditHead().Seq))
	if c.certs != nil {
		if end := c.certs.Status(time.Now()).NotAfter; !end.IsZero() {
			gauge(certEnd, float64(end.Unix()))
		}
	}
}
