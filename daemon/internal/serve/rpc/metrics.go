package rpc

import (
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/msbd/msbd/api/rpc"
)

// unknownMethod is the label of calls of methods that do not exist, so that no client can make more labels.
const unknownMethod = "unknown"

// runSeconds are the bounds of the histogram of calls: from a lookup to the longest run.
var runSeconds = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600}

// metrics is what the Service reports to Prometheus.
type metrics struct {
	calls *prometheus.CounterVec // method, code
	// succeeded and duration are by method: most calls are found without hashing their labels.
	succeeded map[string]prometheus.Counter
	duration  map[string]prometheus.Observer
}

func newMetrics(registry *prometheus.Registry, methods map[string]method) (*metrics, error) {
	m := &metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "msbd_rpc_calls_total", Help: "JSON-RPC calls, members of batches included, by method and error code (0: none).",
		}, []string{"method", "code"}),
		succeeded: map[string]prometheus.Counter{},
		duration:  map[string]prometheus.Observer{},
	}
	duration := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "msbd_rpc_duration_seconds", Help: "How long JSON-RPC calls took, by method.", Buckets: runSeconds,
	}, []string{"method"})
	for _, c := range []prometheus.Collector{m.calls, duration} {
		if err := registry.Register(c); err != nil {
			return nil, fmt.Errorf("register metrics: %w", err)
		}
	}
	for _, method := range append(slices.Collect(maps.Keys(methods)), rpc.MethodDiscover, unknownMethod) {
		m.succeeded[method] = m.calls.WithLabelValues(method, "0")
		m.duration[method] = duration.WithLabelValues(method)
	}
	return m, nil
}

// call counts a call; method is one of the table, rpc.MethodDiscover or unknownMethod.
func (m *metrics) call(method string, failed *rpc.Error, took time.Duration) {
	m.duration[method].Observe(took.Seconds())
	if failed == nil {
		m.succeeded[method].Inc()
		return
	}
	m.calls.WithLabelValues(method, strconv.Itoa(int(failed.Code))).Inc()
}
