package http

import (
	"net/http"
	"net/netip"
	"time"

	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

// These exports are for the tests in package http_test, which can import servetest.
const (
	MaxHeader          = maxHeader
	StrangersBurst     = strangersBurst
	StrangersPerSecond = strangersPerSecond
	RefusalsBurst      = refusalsBurst
	SuccessesBurst     = successesBurst
	LeftOutInterval    = leftOutInterval
)

func (g *Gateway) HTTPServer() *http.Server { return &g.server }
func (g *Gateway) SetDrain(d time.Duration) { g.drain = d }
func (g *Gateway) SetMaxInFlight(n int)     { g.inFlight = limit.NewCounts(n) }
func (g *Gateway) InFlightKeys() int        { return g.inFlight.Keys() }
func (g *Gateway) SetHeld(all, each, freeBytes int) {
	g.held, g.freeBytes = limit.NewBudget(all, each), freeBytes
}
func (g *Gateway) SetTurns(n int)                      { g.turns = limit.NewTurns(n) }
func (g *Gateway) UsersOfTurns() int                   { return g.turns.Users() }
func (g *Gateway) Held() (bytes, keys int)             { return g.held.Held() }
func (g *Gateway) OpenConnections() int                { return g.connections.count() }
func (g *Gateway) ClientIP(r *http.Request) netip.Addr { return g.clientIP(r) }

// ConnectionOwners returns how many keys have connections.
func (g *Gateway) ConnectionOwners() int {
	g.connections.mu.Lock()
	defer g.connections.mu.Unlock()
	return len(g.connections.byKey)
}

// WaitForConnections returns when every connection has ended. It takes all slots, which are free only then.
func (g *Gateway) WaitForConnections() {
	c := g.connections
	for range cap(c.slots) {
		c.slots <- struct{}{}
	}
	for range cap(c.slots) {
		<-c.slots
	}
}
