// Package http serves remote clients over HTTP. The Gateway accepts connections, authenticates API keys, limits, counts
// and logs requests, and passes each one to an endpoint such as JSON-RPC, MCP or metrics. The package decides which tenant
// namespaces a request may use, but does not use sandboxes. Package daemon creates the Gateway. The packages that define
// endpoints import this package.
//
// A request passes these checks, in this order: the limit of connections, the size of the headers, the browser checks
// of dev mode, the route, the API key, the limit of requests in progress, the rate limit, the scope, the body or the
// WebSocket handshake. Then the endpoint serves it.
package http

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

// Verifier checks API keys. *keys.Verifier implements it.
type Verifier interface {
	// Verify returns the principal of a key and records that the key was used by from. For every key that is not
	// accepted, the error is errdefs.ErrUnauthenticated. The error never contains the key. Anybody can send keys, so
	// refusing many must be cheap and must not affect the keys of others.
	Verify(key string, from netip.Addr) (keys.Principal, error)
}

// Options configures a Gateway.
type Options struct {
	Verifier Verifier
	// Endpoints are served in addition to /metrics and the paths that need no key.
	Endpoints []Endpoint
	// Dev accepts every request without checking its key. The gateway then serves on loopback only and refuses
	// requests that a web page may have made a browser send.
	Dev bool
	// RequestsPerSecond limits the calls of each key; 0 means no limit. A key that was idle may make as many calls at
	// once as in one second, and at least one. Each call of a batch counts.
	RequestsPerSecond float64
	// MaxConnections limits the open connections; 0 means 10000. LimitConnections reduces it if the limit of open files is
	// too low. A further connection replaces an idle one of the key that has the most connections; if none is idle, it
	// waits to be accepted. One source gets at most half of them, unless it is this machine or a trusted proxy.
	MaxConnections int
	// TrustedProxies are the addresses of proxies whose X-Forwarded-For is honored. Without it, all clients behind a
	// proxy have the address of the proxy in the log, and share its connection limit.
	TrustedProxies []netip.Prefix
	// Metrics is the registry that GET /metrics returns. The gateway registers its own metrics there. nil means a new
	// registry.
	Metrics *prometheus.Registry
	Log     *slog.Logger
}

const (
	headerTimeout  = 5 * time.Second
	requestTimeout = 30 * time.Second // for the headers and the body together
	idleTimeout    = 60 * time.Second

	// When the gateway stops, it waits drainTimeout for requests to finish. Then it cancels them and waits
	// cancelTimeout until their responses are sent.
	drainTimeout  = 8 * time.Second
	cancelTimeout = 2 * time.Second

	defaultMaxConnections = 10000

	// maxHeader limits the bytes of a request's line and headers.
	maxHeader = 16 << 10

	// maxInFlight limits the requests in progress of one key.
	maxInFlight = 256

	// maxHeld and maxHeldOfKey limit the bytes of long bodies and of pending responses, of all keys and of one key. The
	// memory in use can briefly be three times as much, because of copies.
	maxHeld      = 64 << 20
	maxHeldOfKey = 32 << 20
	// freeBytes is how many bytes a response may have beyond the output of its runs before it counts. A batch whose runs
	// have used up the limit still needs room for the rest of its JSON. As many bytes of a body do not count.
	freeBytes = 64 << 10
	// A request takes turns with the others of its key once more than largeRequest bytes count for it.
	largeRequest = 64 << 10

	// These limit the log lines about requests without a valid key, which anyone can send.
	strangersPerSecond = 10
	strangersBurst     = 1000
	// These limit the log lines about the requests of one key that were refused or failed. Faults of the server, which
	// are logged as errors, are not limited.
	refusalsPerSecond = 1
	refusalsBurst     = 20
	// These limit the log lines about the calls of one key that succeeded.
	successesPerSecond = 100
	successesBurst     = 1000
	// leftOutInterval is how often the log says how many lines of a key were left out.
	leftOutInterval = 10 * time.Second
)

// Gateway is the HTTP server. Create it with New.
type Gateway struct {
	Options
	mux         *http.ServeMux
	inFlight    *limit.Counts
	held        *limit.Budget
	turns       *limit.Turns
	rates       *limit.Rates
	strangerLog *lineLimits // for requests without a valid key
	refusalLog  *lineLimits // for requests with a valid key that did not succeed
	successLog  *lineLimits
	crossOrigin *http.CrossOriginProtection
	metrics     *metrics
	connections *connections
	server      http.Server
	// inProgress counts the requests in progress, including those with a hijacked connection.
	inProgress sync.WaitGroup
	// drain and freeBytes are the constants drainTimeout and freeBytes, except in tests.
	drain     time.Duration
	freeBytes int
}

// New creates a Gateway. It fails if an endpoint is incomplete, such as one without a scope or a deadline, or if two
// endpoints have conflicting patterns.
func New(o Options) (*Gateway, error) {
	if o.MaxConnections <= 0 {
		o.MaxConnections = defaultMaxConnections
	}
	o.MaxConnections, _ = LimitConnections(o.MaxConnections)
	if o.Metrics == nil {
		o.Metrics = prometheus.NewRegistry()
	}
	g := &Gateway{
		Options:     o,
		mux:         http.NewServeMux(),
		inFlight:    limit.NewCounts(maxInFlight),
		held:        limit.NewBudget(maxHeld, maxHeldOfKey),
		turns:       limit.NewTurns(max(1, runtime.GOMAXPROCS(0)/2)), // the other half is for other keys
		rates:       limit.NewRates(o.RequestsPerSecond),
		strangerLog: newLineLimits(o.Log, strangersPerSecond, strangersBurst, "requests refused"),
		refusalLog:  newLineLimits(o.Log, refusalsPerSecond, refusalsBurst, "requests refused"),
		successLog:  newLineLimits(o.Log, successesPerSecond, successesBurst, "calls"),
		crossOrigin: http.NewCrossOriginProtection(),
		connections: newConnections(o.MaxConnections, o.TrustedProxies),
		drain:       drainTimeout,
		freeBytes:   freeBytes,
	}
	g.server = http.Server{
		Handler:           g,
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       requestTimeout,
		IdleTimeout:       idleTimeout,
		// Twice our limit, so that a request slightly over our limit gets our error instead of net/http's.
		MaxHeaderBytes:               2 * maxHeader,
		ConnContext:                  g.connections.context,
		ConnState:                    g.connections.track,
		DisableGeneralOptionsHandler: true,
		ErrorLog:                     slog.NewLogLogger(o.Log.Handler(), slog.LevelDebug),
	}
	g.Endpoints = slices.Concat(openEndpoints, []Endpoint{g.metricsEndpoint()}, o.Endpoints)
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

// Serve serves the connections of ln, which it closes, until ctx ends. Then it waits for the requests in progress,
// cancels those that do not finish in time, and returns nil. Sandboxes are not affected. Serve may be called once.
//
// For TLS, ln must come from tls.NewListener. HTTP/2 is used if its configuration offers the protocol h2.
func (g *Gateway) Serve(ctx context.Context, ln net.Listener) error {
	if tcp, ok := ln.Addr().(*net.TCPAddr); g.Dev && (!ok || !tcp.IP.IsLoopback()) {
		ln.Close()
		return fmt.Errorf("serve on %s: dev mode does not authenticate requests, so it needs a loopback address", ln.Addr())
	}
	requests, cancelRequests := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancelRequests(nil)
	g.server.BaseContext = func(net.Listener) context.Context { return requests }

	served := make(chan error, 1)
	go func() { served <- g.server.Serve(g.connections.listen(ln)) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve on %s: %w", ln.Addr(), err)
	case <-ctx.Done():
	}
	if err := g.shutdown(requests, g.drain); errors.Is(err, context.DeadlineExceeded) {
		cancelRequests(rpcerr.ErrStopping)
		if err := g.shutdown(context.WithoutCancel(requests), cancelTimeout); err != nil {
			g.server.Close()
		}
	}
	<-served
	return nil
}

// shutdown closes the listener and waits until all requests have ended. http.Server does not wait for requests whose
// connection was hijacked, so shutdown also waits for those.
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
