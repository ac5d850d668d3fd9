package http_test

import (
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

func scrape(t *testing.T, s *Site, changes ...func(*http.Request)) string {
	t.Helper()
	w := s.Post("", append(changes, At(http.MethodGet, rpc.MetricsPath))...)
	if w.Code != http.StatusOK || !strings.HasPrefix(w.Header().Get("Content-Type"), "text/plain; version=0.0.4") {
		t.Fatalf("metrics: %d %v %s", w.Code, w.Header(), w.Body)
	}
	return w.Body.String()
}

func TestMetrics(t *testing.T) {
	registry := prometheus.NewRegistry()
	gauge := prometheus.NewGauge(prometheus.GaugeOpts{Name: "msbd_keys", Help: "API keys."})
	gauge.Set(3)
	registry.MustRegister(gauge)
	s := New(t, func(o *Setup) { o.Metrics = registry })
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`), At(http.MethodPost, rpc.StartPath)))
	s.Post("[" + Request("sandbox.stop", `{"sandbox":"gone"}`) + "," + Request("sandbox.stop", `{"sandbox":"broken"}`) + ",1]")
	s.Post(Request(rpc.MethodDiscover, "{}"))
	for i := range 50 {
		s.Post(Request(fmt.Sprint("made.up", i), "{}"))
		s.Post("", At(http.MethodGet, fmt.Sprint("/made/up", i)))
		s.Post("", At(fmt.Sprint("MADEUP", i), rpc.Path))
		s.Post("{", WithKey(fmt.Sprint("madeup", i)))
	}
	text := scrape(t, s)
	for _, want := range []string{
		`msbd_keys 3`,
		`msbd_http_requests_total{code="200",path="/api/v1/rpc"} 3`,
		`msbd_http_requests_total{code="200",path="/api/v1/sandbox/start"} 1`,
		`msbd_http_requests_total{code="200",path="/api/v1/health"} 0`,
		`msbd_http_requests_total{code="401",path="/api/v1/rpc"} 50`,
		`msbd_http_requests_total{code="404",path="/api/v1/rpc"} 50`,
		`msbd_http_requests_total{code="405",path="/api/v1/rpc"} 50`,
		`msbd_http_requests_total{code="404",path="other"} 50`,
		`msbd_rpc_calls_total{code="0",method="sandbox.start"} 2`,
		`msbd_rpc_calls_total{code="0",method="rpc.discover"} 1`,
		`msbd_rpc_calls_total{code="0",method="sandbox.repl.run"} 0`,
		`msbd_rpc_calls_total{code="-32003",method="sandbox.stop"} 1`,
		`msbd_rpc_calls_total{code="-32603",method="sandbox.stop"} 1`,
		`msbd_rpc_calls_total{code="-32600",method="unknown"} 1`,
		`msbd_rpc_calls_total{code="-32601",method="unknown"} 50`,
		`msbd_rpc_duration_seconds_count{method="sandbox.start"} 2`,
		`msbd_rpc_duration_seconds_bucket{method="sandbox.start",le="0.001"} `,
		`msbd_rpc_duration_seconds_bucket{method="sandbox.start",le="3600"} 2`,
		`msbd_http_requests_in_flight 1`,
		`msbd_auth_failures_total 50`,
		`msbd_connections 0`,
	} {
		if !strings.Contains(text, "\n"+want) {
			t.Errorf("the metrics lack %s", want)
		}
	}
	if strings.Contains(strings.ToLower(text), "madeup") || strings.Contains(text, "made.up") || strings.Contains(text, "made/up") {
		t.Error("a label has a value that a client sent")
	}
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v %v", problems, err)
	}
	var names []string
	for _, m := range regexp.MustCompile(`(?m)^# TYPE (\S+)`).FindAllStringSubmatch(text, -1) {
		names = append(names, m[1])
	}
	if want := []string{"msbd_auth_failures_total", "msbd_connections", "msbd_http_requests_in_flight", "msbd_http_requests_total", "msbd_keys",
		"msbd_rpc_calls_total", "msbd_rpc_duration_seconds"}; !slices.Equal(names, want) {
		t.Errorf("the metrics are %q, want %q", names, want)
	}
	if t.Failed() {
		t.Log(text)
	}
	// A scrape itself counts as a request, and a key with only the metrics scope may scrape.
	key := s.Issue(t, keys.IssueRequest{Scopes: []keys.Scope{keys.ScopeMetrics}})
	if again := scrape(t, s, WithKey(key)); !strings.Contains(again, `msbd_http_requests_total{code="200",path="/metrics"} 1`) {
		t.Error("the metrics do not count the first scrape")
	}
}

func TestConnectionsMetric(t *testing.T) {
	s := New(t)
	addr, stop := s.Listen(t)
	defer stop()
	for range 3 {
		checkHealth(t, dialTest(t, addr))
	}
	if text := scrape(t, s); !strings.Contains(text, "\nmsbd_connections 3\n") {
		t.Error("want msbd_connections 3, got:", text)
	}
}

// If a metric cannot be gathered, the response is an error, not a part of the metrics.
func TestMetricsError(t *testing.T) {
	registry := prometheus.NewRegistry()
	registry.MustRegister(prometheus.CollectorFunc(func(out chan<- prometheus.Metric) {
		out <- prometheus.NewInvalidMetric(prometheus.NewDesc("msbd_broken", "Broken.", nil, nil), fmt.Errorf("no measure"))
	}))
	s := New(t, func(o *Setup) { o.Metrics = registry })
	WantError(t, s.Post("", At(http.MethodGet, rpc.MetricsPath)), http.StatusInternalServerError, rpc.CodeInternal)
	if !strings.Contains(s.Log.String(), "no measure") {
		t.Error("the log lacks the cause:", s.Log)
	}
	if _, err := gateway.New(gateway.Options{Verifier: s.Verifier, Metrics: registry, Log: s.Options.Log}); err == nil {
		t.Error("New accepted a registry that already has the gateway's metrics")
	}
}
