// Package http is the door for remote clients: JSON-RPC 2.0 over HTTP behind API keys. It
// authenticates, limits, decodes strictly, authorises against one table of methods and calls the
// domain; it decides nothing about sandboxes itself. Only the wiring enters.
//
// A request goes through, in this order: connections, headers, request id, browser checks (dev mode),
// route, API key, requests in flight, rate, body, JSON, method, scope, params, namespace, handler.
package http

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"time"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// Verifier says whose an API key is. Its error is errdefs.ErrUnauthenticated for a key that is not
// accepted, whatever the cause; it never holds the key. It counts a use of the key by from.
type Verifier interface {
	Verify(key string, from netip.Addr) (keys.Principal, error)
}

// Sandboxes is what the gateway asks of the domain. Errors carry errdefs classes, or are
// sandbox.ErrRunTimeout and sandbox.ErrCommandNotFound.
type Sandboxes interface {
	Start(context.Context, sandbox.Name, sandbox.Request) error
	Stop(context.Context, sandbox.Name) error
	RunCode(context.Context, sandbox.Name, sandbox.CodeRun) (sandbox.CodeResult, error)
	RunCommand(context.Context, sandbox.Name, sandbox.CommandRun) (sandbox.CommandResult, error)
	Metrics(ctx context.Context, namespace, name string) ([]sandbox.Metrics, error)
}

// Options is what a Gateway is made from.
type Options struct {
	Verifier  Verifier
	Sandboxes Sandboxes
	// Dev accepts every request without looking at its key. Such a gateway serves on loopback only
	// and refuses what a foreign web page may have sent.
	Dev bool
	// RequestsPerSecond bounds the calls of one key; 0 is no bound. A key that was quiet may make those
	// of one second at once, and at least one. Each member of a batch counts.
	RequestsPerSecond float64
	// MaxConnections bounds the connections at a time; 0 means 10000. More than that wait to be taken.
	// A source that is not this machine gets half of them at most.
	MaxConnections int
	// TrustedProxies are the addresses of proxies whose X-Forwarded-For is believed: it says for whom they
	// ask. Without it, all clients behind a proxy share the bound on bad keys, and one locks out the others.
	TrustedProxies []netip.Prefix
	// Metrics is what GET /metrics answers with; the gateway adds its own. nil means only these.
	Metrics *prometheus.Registry
	Log     *slog.Logger
}

const (
	headerTimeout  = 5 * time.Second
	requestTimeout = 30 * time.Second // headers and body
	answerTimeout  = 60 * time.Second // for the client to take it, from when there is one
	idleTimeout    = 60 * time.Second

	// A stop waits drainTimeout for runs to end by themselves, then cuts them short and gives their
	// answers cutTimeout to leave.
	drainTimeout = 8 * time.Second
	cutTimeout   = 2 * time.Second

	defaultMaxConnections = 10000

	// maxInFlight bounds the requests of one key at a time.
	maxInFlight = 256

	// Anybody can make the log longer by requests without a key: so much, and no more.
	refusalsPerSecond = 10
	refusalsBurst     = 1000
)

// Gateway is the HTTP handler. Make it with New.
type Gateway struct {
	Options
	routes      map[string]route
	methods     map[string]method
	description jsontext.Value
	tries       *tries
	inFlight    *inFlight
	outputs     *outputs
	rates       *rates
	refusals    *rate.Limiter // of lines in the log about requests without a good key
	browsers    *http.CrossOriginProtection
	measures    *measures
	connections *connections
	server      http.Server
	// answerTimeout and drain are the constants, but for tests.
	answerTimeout, drain time.Duration
}

// New makes a Gateway. It fails when a method is declared without a scope.
func New(o Options) (*Gateway, error) {
	if o.MaxConnections <= 0 {
		o.MaxConnections = defaultMaxConnections
	}
	if o.Metrics == nil {
		o.Metrics = prometheus.NewRegistry()
	}
	g := &Gateway{
		Options:     o,
		tries:       newTries(),
		inFlight:    newInFlight(maxInFlight),
		outputs:     newOutputs(maxOutputs, maxOutputsOfKey),
		rates:       newRates(o.RequestsPerSecond),
		refusals:    rate.NewLimiter(refusalsPerSecond, refusalsBurst),
		browsers:    http.NewCrossOriginProtection(),
		connections: newConnections(o.MaxConnections, o.TrustedProxies),

		answerTimeout: answerTimeout,
		drain:         drainTimeout,
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
	g.routes = g.routeTable()
	table := g.table()
	var err error
	if g.methods, err = index(table); err != nil {
		return nil, err
	}
	g.description = describe(table)
	if g.measures, err = newMeasures(g); err != nil {
		return nil, err
	}
	return g, nil
}

// Serve answers on ln, which it closes, until ctx ends; then it drains and returns nil. It may be
// called once. Runs that do not end in time are cut short; sandboxes are left as they are.
//
// A listener of TLS connections is one from tls.NewListener; HTTP/2 is spoken if its configuration
// offers the protocol h2.
func (g *Gateway) Serve(ctx context.Context, ln net.Listener) error {
	if tcp, ok := ln.Addr().(*net.TCPAddr); g.Dev && (!ok || !tcp.IP.IsLoopback()) {
		ln.Close()
		return fmt.Errorf("serve on %s: in dev mode nothing is authenticated, so it listens on a loopback address only", ln.Addr())
	}
	runs, cutRuns := context.WithCancel(context.WithoutCancel(ctx))
	defer cutRuns()
	g.server.BaseContext = func(net.Listener) context.Context { return runs }

	served := make(chan error, 1)
	go func() { served <- g.server.Serve(g.connections.listen(ln)) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve on %s: %w", ln.Addr(), err)
	case <-ctx.Done():
	}
	if err := g.shutdown(runs, g.drain); errors.Is(err, context.DeadlineExceeded) {
		cutRuns()
		if err := g.shutdown(context.WithoutCancel(runs), cutTimeout); err != nil {
			g.server.Close()
		}
	}
	<-served
	return nil
}

func (g *Gateway) shutdown(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return g.server.Shutdown(ctx)
}
