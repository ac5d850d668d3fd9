package mcp

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

// reportProgress tells the client that its call continues, until stop is called.
//
// If the client sent a progress token, it gets progress notifications. The first one is sent before reportProgress returns, so
// that the client and the proxies before it get the headers of the response, and know that the call was accepted.
//
// Without a token, no revision of the protocol allows progress notifications. If the call takes long, the response becomes a
// stream with comments, which keep the connection alive. The revisions before 2026-07-28 let the server choose log messages that
// it sends, so the client also gets one each time, unless it has asked for more important ones only. In revision 2026-07-28, it
// gets them only if its call asks for them.
func (c *call) reportProgress(req *sdk.CallToolRequest) (stop func()) {
	start := time.Now()
	message := func() string { return fmt.Sprintf("running for %s", time.Since(start).Round(time.Second)) }
	response, token := c.request.response, req.Params.GetProgressToken()
	if token == nil {
		if !response.single { // a call of a batch, which is answered with JSON
			return func() {}
		}
		return c.repeat(c.handler.maxSilence, func(ctx context.Context) error {
			response.beginStream()
			if err := response.keepAlive(); err != nil {
				return err
			}
			if !c.handler.logLevels.allowInfo(c.request.client) {
				return nil
			}
			//lint:ignore SA1019 See the capabilities in New.
			return req.Session.Log(ctx, &sdk.LoggingMessageParams{Level: "info", Logger: req.Params.Name, Data: message()})
		})
	}
	response.beginStream()
	notify := func(ctx context.Context) error {
		return req.Session.NotifyProgress(ctx, &sdk.ProgressNotificationParams{
			ProgressToken: token, Progress: time.Since(start).Seconds(), Message: message(),
		})
	}
	if notify(c.ctx) != nil {
		return func() {} // the client has disconnected, which cancels the call
	}
	return c.repeat(c.handler.progressInterval, notify)
}

// repeat calls notify at intervals until stop is called, the call ends, or notify fails because the client has disconnected.
func (c *call) repeat(interval time.Duration, notify func(context.Context) error) (stop func()) {
	ctx, cancel := context.WithCancel(c.ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		ticks := time.NewTicker(interval)
		defer ticks.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-ticks.C:
			}
			if notify(ctx) != nil {
				return
			}
		}
	}()
	return func() {
		cancel()
		<-done
	}
}

// maxLogLevels is how many clients have a log level that the server remembers.
const maxLogLevels = 4096

// logLevels remembers the log levels that clients have set with logging/setLevel.
type logLevels struct {
	mu       *sync.Mutex
	ofClient *limit.LRU[callKey, string]
}

func newLogLevels() logLevels {
	return logLevels{&sync.Mutex{}, limit.NewLRU[callKey, string](maxLogLevels)}
}

// maxLabel is the length of the longest label of a client that is remembered. Those that the server issues are shorter.
const maxLabel = 64

// infoLevels are the levels with which a client gets messages of the level info, and otherLevels are the others.
var (
	infoLevels  = []string{"debug", "info"}
	otherLevels = []string{"notice", "warning", "error", "critical", "alert", "emergency"}
)

// set sets the log level of a client. A client without a label cannot be told from others.
func (l logLevels) set(client callKey, level string) {
	if client.label == "" || len(client.label) > maxLabel || !slices.Contains(slices.Concat(infoLevels, otherLevels), level) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ofClient.Put(client, level)
}

// allowInfo reports whether a client wants messages of the level info. By default, it does.
func (l logLevels) allowInfo(client callKey) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	level, ok := l.ofClient.Get(client)
	return !ok || slices.Contains(infoLevels, level)
}
