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

// unknownMethod is the method label of every call to a method that does not exist, so that clients cannot add labels.
const unknownMethod = "unknown"

// durationBuckets are the histogram buckets of msbd_rpc_duration_seconds, from a lookup to the longest run.
var durationBuckets = []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600}

// metrics are the Prometheus metrics of a Service.
type metrics struct {
	calls *prometheus.CounterVec // method, code
	// succeeded and duration are keyed by method, so that a successful call needs no hashing of labels.
	succeeded map[string]prometheus.Counter
	duration  map[string]prometheus.Observer
}

func newMetrics(registry *prometheus.Registry, methods map[string]method) (*metrics, error) {
	m := &metrics{
		calls: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "msbd_rpc_calls_total", Help: "JSON-RPC calls, including the members of batches, by method and error code (0 if the call succeeded).",
		}, []string{"method", "code"}),
		succeeded: map[string]prometheus.Counter{},
		duration:  map[string]prometheus.Observer{},
	}
	duration := prometheus.NewHistogramVec(prometheus.HistogramOpts{
		Name: "msbd_rpc_duration_seconds", Help: "Duration of JSON-RPC calls, by method.", Buckets: durationBuckets,
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

// observe records a call. method must be in the table, rpc.MethodDiscover or unknownMethod.
func (m *metrics) observe(method string, rpcErr *rpc.Error, took time.Duration) {
	m.duration[method].Observe(took.Seconds())
	if rpcErr == nil {
		m.succeeded[method].Inc()
		return
	}
	m.calls.WithLabelValues(method, strconv.Itoa(int(rpcErr.Code))).Inc()
}
