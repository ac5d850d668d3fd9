package keys_test

import (
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/keys/keystest"
)

func init() { keys.NewMemory = func() keys.Memory { return keystest.NewMemoryStore() } }
