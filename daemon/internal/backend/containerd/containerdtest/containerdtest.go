// Package containerdtest runs a containerd for tests. Only tests may import it.
package containerdtest

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd"

	ctrd "github.com/msbd/msbd/daemon/internal/backend/containerd"
)

// Start starts a private containerd for this test and stops it when the test ends.
func Start(t *testing.T) (*ctrd.Private, *containerd.Client) {
	t.Helper()
	// Tests run in their package's directory, a subdirectory of backend.
	binary, err := filepath.Abs("../../../../bin/containerd")
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "containerd") // t.TempDir is too long for sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	private := &ctrd.Private{
		Binary: binary,
		Paths:  ctrd.Paths{Address: filepath.Join(dir, "containerd.sock"), Root: filepath.Join(dir, "root"), State: filepath.Join(dir, "state")},
		Log:    slog.New(slog.DiscardHandler),
	}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	if err := private.Start(ctx); err != nil {
		t.Fatalf("%v: run make build", err)
	}
	t.Cleanup(func() {
		if err := private.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	client, err := ctrd.Dial(private.Address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return private, client
}
