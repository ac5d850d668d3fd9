package http

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"

	"github.com/msbd/msbd/api/rpc"
)

// What a client made up is one value of its label, so that no client can make more of them.
const (
	unknownMethod = "unknown"
	unknownPath   = "other"
)

// runSeconds are the bounds of the histogram of runs: from a lookup to the longest run.
var runSeconds = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600}

// measures is what the gateway tells Prometheus of itself.
type measures struct {
	requests     *prometheus.CounterVec // path, code
	calls        *prometheus.CounterVec // method, code
	inFlight     prometheus.Gauge
	authFailures prometheus.Counter

	// What is counted most is found without its labels' being hashed: answers of 200 by path, calls that
	// succeeded and the time that calls took by method.
	served    map[string]prometheus.Counter
	succeeded map[string]prometheus.Counter
	duration  map[string]prometheus.Observer
}

func newMeasures(g *Gateway) (*measures, error) {
	m := &measures{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "msbd_http_requests_total", Help: "HTTP requests that were answered, by path and status.",
		}, []string{"path", "code"}),
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "msbd_rpc_calls_total", Help: "JSON-RPC calls, members of batches included, by method and error code (0: none).",
		}, []string{"method", "code"}),
		inFlight: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "msbd_http_requests_in_flight", Help: "HTTP requests in progress.",
		}),
		authFailures: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "msbd_auth_failures_total", Help: "HTTP requests that were answered with 401.",
		}),
		served:    map[string]prometheus.Counter{},
		succeeded: map[string]prometheus.Counter{},
		duration:  map[string]prometheus.Observer{},
	}
	duration := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "msbd_rpc_duration_seconds", Help: "How long JSON-RPC calls took, by method.", Buckets: runSeconds,
	}, []string{"method"})
	connections := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "msbd_connections", Help: "Open connections to the gateway.",
	}, func() float64 { return float64(g.connections.count()) })
	for _, c := range []prometheus.Collector{m.requests, m.calls, duration, m.inFlight, m.authFailures, connections} {
		if err := g.Metrics.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	for path := range g.routes {
		m.served[path] = m.requests.WithLabelValues(path, "200")
	}
	for _, method := range append(slices.Collect(maps.Keys(g.methods)), rpc.MethodDiscover, unknownMethod) {
		m.succeeded[method] = m.calls.WithLabelValues(method, "0")
		m.duration[method] = duration.WithLabelValues(method)
	}
	return m, nil
}

// request counts an answer; path is one of the table of routes or unknownPath.
func (m *measures) request(path string, status int) {
	if c := m.served[path]; c != nil && status == http.StatusOK {
		c.Inc()
		return
	}
	m.requests.WithLabelValues(path, strconv.Itoa(status)).Inc()
}

// call counts a call; method is one of the table of methods, rpc.MethodDiscover or unknownMethod.
func (m *measures) call(method string, failed *rpc.Error, took time.Duration) {
	m.duration[method].Observe(took.Seconds())
	if failed == nil {
		m.succeeded[method].Inc()
		return
	}
	m.calls.WithLabelValues(method, strconv.Itoa(int(failed.Code))).Inc()
}

// serveMetrics answers in Prometheus's text format.
func (g *Gateway) serveMetrics(_ context.Context, x *exchange) answer {
	families, err := g.Metrics.Gather()
	if err != nil {
		return g.refuse(x, fmt.Errorf("gather metrics: %w", err))
	}
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(x.out, f); err != nil {
			return g.refuse(x, fmt.Errorf("write metrics: %w", err))
		}
	}
	g.logCall(x, &call{method: rpc.MetricsPath}, nil, time.Since(x.began), nil)
	return answer{
		status: http.StatusOK,
		header: http.Header{"Content-Type": {string(expfmt.NewFormat(expfmt.TypeTextPlain))}},
		body:   x.out.Bytes(),
	}
}
