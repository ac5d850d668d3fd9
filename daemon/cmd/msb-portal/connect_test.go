package main

import (
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/guest/portalclient"
)

// TestReconnect checks that a new connection ends the bridge of the previous one, and that the REPL keeps its state.
func TestReconnect(t *testing.T) {
	t.Parallel()
	g := startGuest(t)
	old := g.bridge(t)
	client, err := portalclient.New(t.Context(), old)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	first := &connection{client}
	runCode(t, first, sandbox.Python, "x = 1")

	// Start a run that the end of its connection has to interrupt.
	started := fifo(t)
	ended := make(chan error, 1)
	go func() {
		_, err := first.runCode(t.Context(), sandbox.Code{
			Language: sandbox.Python, Text: fmt.Sprintf("open(%q, 'w').close()\nwhile True: pass", started),
		})
		ended <- err
	}()
	wait(t, started)

	second := g.connect(t)
	<-old.ended
	if err := <-ended; !errors.Is(err, sandbox.ErrRunFailed) {
		t.Errorf("run on the old connection: %v, want sandbox.ErrRunFailed", err)
	}
	expect(t, second, sandbox.Python, "x", true, "stdout: 1\n")
	if err := first.Ping(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("ping on the old connection: %v, want errdefs.ErrUnavailable", err)
	}
}

func TestBridgeEndsWithItsClient(t *testing.T) {
	t.Parallel()
	b := startGuest(t).bridge(t)
	c, err := portalclient.New(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	<-b.ended
	if err := c.Ping(t.Context()); !errdefs.IsUnavailable(err) {
		t.Errorf("ping after Close: %v, want errdefs.ErrUnavailable", err)
	}
}

// TestConnectWaitsForTheServer starts `msb-portal connect` before `msb-portal serve`.
func TestConnectWaitsForTheServer(t *testing.T) {
	t.Parallel()
	g := newGuest()
	b := g.bridge(t)
	connected := make(chan error, 1)
	go func() {
		c, err := portalclient.New(t.Context(), b)
		if err == nil {
			c.Close()
		}
		connected <- err
	}()
	g.serve(t)
	if err := <-connected; err != nil {
		t.Error(err)
	}
}

func TestNewIsBoundedByItsContext(t *testing.T) {
	t.Parallel()
	b := newGuest().bridge(t)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := portalclient.New(ctx, b); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("New without a server: %v, want context.DeadlineExceeded", err)
	}
}

func BenchmarkPing(b *testing.B) {
	c := startGuest(b).connect(b)
	for b.Loop() {
		if err := c.Ping(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRunCode(b *testing.B) {
	for _, language := range []sandbox.Language{sandbox.Python, sandbox.Node} {
		b.Run(string(language), func(b *testing.B) {
			c := startGuest(b).connect(b)
			runCode(b, c, language, "1+1")
			for b.Loop() {
				runCode(b, c, language, "1+1")
			}
		})
	}
}

func BenchmarkRunCommand(b *testing.B) {
	c := startGuest(b).connect(b)
	for b.Loop() {
		if _, err := c.runCommand(b.Context(), sandbox.Command{Program: "true"}); err != nil {
			b.Fatal(err)
		}
	}
}
