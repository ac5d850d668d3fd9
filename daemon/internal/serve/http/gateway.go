// Package http serves remote clients over HTTP. It accepts connections, authenticates API keys, limits, counts and
// logs, and hands each request to an endpoint: JSON-RPC, MCP, metrics and others. It knows nothing of sandboxes.
// Package daemon makes the Gateway; the packages of endpoints import this one.
//
// A request passes these checks, in this order: connections, headers, browser (dev mode), route, API key, requests in
// progress, rate, scope, body. Then the endpoint serves it.
package http

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

// Verifier checks API keys. A *keys.Verifier is one.
type Verifier interface {
	// Verify returns whom a key speaks for, and counts one use of it by from. The error is errdefs.ErrUnauthenticated
	// for a key that is not accepted, whatever the cause; it never contains the key.
	Verify(key string, from netip.Addr) (keys.Principal, error)
	// Known reports whether a key was accepted before and still is. It costs no cryptography.
	Known(key string) bool
}

// Options configures a Gateway.
type Options struct {
	Verifier Verifier
	// Endpoints are what the gateway serves, beside /health and /metrics.
	Endpoints []Endpoint
	// Dev accepts every request without looking at its key. Such a gateway serves on loopback only
	// and refuses what a foreign web page may have sent.
	Dev bool
	// RequestsPerSecond bounds the calls of one key; 0 is no bound. A key that was quiet may make the calls
	// of one second at once, and at least one. Each member of a batch counts.
	RequestsPerSecond float64
	// MaxConnections bounds the connections at a time; 0 means 10000. More than that wait to be accepted.
	// A source other than this machine gets half of them at most.
	MaxConnections int
	// TrustedProxies are the addresses of proxies whose X-Forwarded-For is honoured. Without it, all clients
	// behind a proxy share the bound on bad keys, and one locks out the others.
	TrustedProxies []netip.Prefix
	// Metrics is what GET /metrics answers with; the gateway adds its own. nil means only these.
	Metrics *prometheus.Registry
	Log     *slog.Logger
}

const (
	headerTimeout  = 5 * time.Second
	requestTimeout = 30 * time.Second // headers and body
	idleTimeout    = 60 * time.Second

	// A stop waits drainTimeout for requests to end by themselves, then cuts them short and gives their
	// answers cancelTimeout to leave.
	drainTimeout  = 8 * time.Second
	cancelTimeout = 2 * time.Second

	defaultMaxConnections = 10000

	// maxHeader bounds the bytes of a request's line and headers.
	maxHeader = 16 << 10

	// maxInFlight bounds the requests of one key at a time.
	maxInFlight = 256

	// The most bytes that are held for responses at a time. In passing, there are up to three copies of them.
	maxHeld      = 64 << 20 // of all keys
	maxHeldOfKey = 32 << 20
	// uncounted is what a response may have beyond the output of its runs before it is counted: the envelopes of a
	// batch must fit when its runs have used up the bound.
	uncounted = 64 << 10

	// Anybody can make the log longer by requests without a key: by this much, and no more.
	refusalsPerSecond = 10
	refusalsBurst     = 1000
)

// Gateway is the HTTP handler. Make it with New.
type Gateway struct {
	Options
	mux         *http.ServeMux
	badKeys     *badKeyLimiter
	inFlight    *limit.Counts
	held        *limit.Budget
	rates       *limit.Rates
	refusalLog  *rate.Limiter // of lines in the log about requests without a good key
	crossOrigin *http.CrossOriginProtection
	metrics     *metrics
	connections *connections
	server      http.Server
	// inProgress counts the requests in progress, including those whose connection was hijacked.
	inProgress sync.WaitGroup
	// drain and uncounted are the constants, except in tests.
	drain     time.Duration
	uncounted int
}

// New makes a Gateway. It fails if an endpoint has no scope, no deadline, or the pattern of another.
func New(o Options) (*Gateway, error) {
	if o.MaxConnections <= 0 {
		o.MaxConnections = defaultMaxConnections
	}
	if o.Metrics == nil {
		o.Metrics = prometheus.NewRegistry()
	}
	g := &Gateway{
		Options:     o,
		mux:         http.NewServeMux(),
		badKeys:     newBadKeyLimiter(o.Verifier),
		inFlight:    limit.NewCounts(maxInFlight),
		held:        limit.NewBudget(maxHeld, maxHeldOfKey),
		rates:       limit.NewRates(o.RequestsPerSecond),
		refusalLog:  rate.NewLimiter(refusalsPerSecond, refusalsBurst),
		crossOrigin: http.NewCrossOriginProtection(),
		connections: newConnections(o.MaxConnections, o.TrustedProxies),
		drain:       drainTimeout,
		uncounted:   uncounted,
	}
	g.server = http.Server{
		Handler:           g,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       requestTimeout,
		IdleTimeout:       idleTimeout,
		// Twice the limit, so that what is only somewhat over it gets an answer of ours.
		MaxHeaderBytes:               2 * maxHeader,
		ConnState:                    g.connections.track,
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
	}
	g.Endpoints = append([]Endpoint{healthEndpoint, g.metricsEndpoint()}, o.Endpoints...)
	for _, e := range g.Endpoints {
		if err := g.handle(e); err != nil {
			return nil, err
		}
	}
	var err error
	if g.metrics, err = newMetrics(g); err != nil {
		return nil, err
	}
	return g, nil
}

// Serve answers on ln, which it closes, until ctx ends; then it drains and returns nil. It may be
// called once. Requests that do not end in time are cut short; sandboxes are left as they are.
//
// A listener of TLS connections is one from tls.NewListener; HTTP/2 is spoken if its configuration
// offers the protocol h2.
func (g *Gateway) Serve(ctx context.Context, ln net.Listener) error {
	if tcp, ok := ln.Addr().(*net.TCPAddr); g.Dev && (!ok || !tcp.IP.IsLoopback()) {
		ln.Close()
		return fmt.Errorf("serve on %s: in dev mode nothing is authenticated, so it listens on a loopback address only", ln.Addr())
	}
	requests, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	g.server.BaseContext = func(net.Listener) context.Context { return requests }

	served := make(chan error, 1)
	go func() { served <- g.server.Serve(g.connections.listen(ln)) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve on %s: %w", ln.Addr(), err)
	case <-ctx.Done():
	}
	if err := g.shutdown(requests, g.drain); errors.Is(err, context.DeadlineExceeded) {
		cut()
		if err := g.shutdown(context.WithoutCancel(requests), cancelTimeout); err != nil {
			g.server.Close()
		}
	}
	<-served
	return nil
}

// shutdown waits for the requests in progress. Of hijacked connections, which http.Server forgets, it waits for
// the endpoints that have them.
func (g *Gateway) shutdown(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	if err := g.server.Shutdown(ctx); err != nil {
		return err
	}
	ended := make(chan struct{})
	go func() {
		g.inProgress.Wait()
		close(ended)
	}()
	select {
	case <-ended:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
