package sandboxtest

import (
	"testing"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

func TestMemoryStore(t *testing.T) {
	t.Parallel()
	TestStore(t, func(*testing.T) sandbox.Store { return NewMemoryStore() }, nil)
}
