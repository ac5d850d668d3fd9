package backup_test

import (
	"os"
	"testing"

	"github.com/msbd/msbd/daemon/internal/data/store"
)

func TestMain(m *testing.M) {
	store.MaybeCheckChild()
	os.Exit(m.Run())
}
