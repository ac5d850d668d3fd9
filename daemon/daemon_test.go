package daemon

import (
	"testing"

	"github.com/msbd/msbd/client"
	"github.com/msbd/msbd/daemon/internal/sys/config"
)

// By default, msb connects to the socket on which msbd listens.
func TestDefaultSocketIsTheSame(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	if got, want := client.DefaultSocket(), config.Default().SocketPath(); got != want {
		t.Errorf("msb connects to %s, but msbd listens on %s", got, want)
	}
}
