package sandbox_test

import (
	"testing"
	"time"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox/sandboxtest"
)

// The fakes fulfill the same contracts as the real implementations.
func TestFakePortal(t *testing.T) {
	sandboxtest.TestPortal(t, func(t *testing.T) sandbox.Portal {
		p, err := sandboxtest.NewGuest().Connect(t.Context(), nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		return p
	})
}

func TestFakeRuntime(t *testing.T) {
	r := sandboxtest.NewRuntime()
	sandboxtest.TestRuntime(t, sandboxtest.RuntimeUnderTest{
		Runtime: r, Image: "any", Kill: func(id string) error { r.Kill(id); return nil }, Patience: time.Minute,
	})
}
