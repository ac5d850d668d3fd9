package keystest

import (
	"testing"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

func TestMemoryStore(t *testing.T) {
	t.Parallel()
	TestStore(t, func(*testing.T) keys.Store { return NewMemoryStore() }, nil)
}
