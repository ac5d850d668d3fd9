package name

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestValidate(t *testing.T) {
	for _, good := range []string{"a", "A", "0", "my-env", "my_env", strings.Repeat("x", 63)} {
		if err := Validate("sandbox name", good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for _, bad := range []string{"", "-a", "_a", "a.b", "a/b", "a b", "ä", "a\n", "a\x00", strings.Repeat("x", 64), strings.Repeat("x", 1<<20)} {
		err := Validate("namespace", bad)
		if !errdefs.IsInvalidArgument(err) || !strings.HasPrefix(err.Error(), "namespace ") || len(err.Error()) > 300 {
			t.Errorf("%.20q: %.300v", bad, err)
		}
	}
}
