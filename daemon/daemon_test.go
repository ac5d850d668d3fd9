package daemon

import (
	"testing"

	"github.com/msbd/msbd/client"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

// A msb and a msbd that were told nothing find each other, for root and for others.
func TestClientLooksWhereTheDaemonListens(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	if got, want := client.DefaultSocket(), config.Default().SocketPath(); got != want {
		t.Errorf("msb looks at %s, msbd listens on %s", got, want)
	}
}
