package http

import (
	"fmt"
	"net/http"
	"strconv"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// unknownPath is the label of all paths without an endpoint, so that clients cannot create labels.
const unknownPath = "other"

// metrics holds the Prometheus metrics of the gateway.
type metrics struct {
	requests     *prometheus.CounterVec // labels: path, code
	inFlight     prometheus.Gauge
	authFailures prometheus.Counter
	// served has the counter of responses with status 200 for each path. Most requests are counted there, without the
	// cost of hashing their labels.
	served map[string]prometheus.Counter
}

func newMetrics(g *Gateway) (*metrics, error) {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "msbd_http_requests_total", Help: "HTTP responses by path and status.",
		}, []string{"path", "code"}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "msbd_http_requests_in_flight", Help: "HTTP requests in progress.",
		}),
		authFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "msbd_auth_failures_total", Help: "HTTP responses with status 401.",
		}),
		served: map[string]prometheus.Counter{},
	}
	connections := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "msbd_connections", Help: "Open connections to the gateway.",
	}, func() float64 { return float64(g.connections.count()) })
	for _, c := range []prometheus.Collector{m.requests, m.inFlight, m.authFailures, connections} {
		if err := g.Metrics.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	for _, e := range g.Endpoints {
		m.served[e.path()] = m.requests.WithLabelValues(e.path(), "200")
	}
	return m, nil
}

// countResponse counts a response. path is the path of an endpoint's pattern, or unknownPath.
func (m *metrics) countResponse(path string, status int) {
	if c := m.served[path]; c != nil && status == http.StatusOK {
		c.Inc()
		return
	}
	m.requests.WithLabelValues(path, strconv.Itoa(status)).Inc()
}

// metricsEndpoint returns the endpoint that serves the metrics in the text format of Prometheus.
func (g *Gateway) metricsEndpoint() Endpoint {
	return Endpoint{
		Pattern: "GET " + rpc.MetricsPath, Scope: keys.ScopeMetrics, WholeServer: true, Deadline: AnswerDeadline,
		Serve: func(_ *Call, w http.ResponseWriter, _ *http.Request) error {
			families, err := g.Metrics.Gather()
			if err != nil {
				return fmt.Errorf("gather metrics: %w", err)
			}
			w.Header()["Content-Type"] = []string{string(expfmt.NewFormat(expfmt.TypeTextPlain))}
			for _, f := range families {
				if _, err := expfmt.MetricFamilyToText(w, f); err != nil {
					return fmt.Errorf("write metrics: %w", err)
				}
			}
			return nil
		},
	}
}
