package http_test

import (
	"net/http"
	"slices"
	"testing"

	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
)

func TestAccepted(t *testing.T) {
	h := http.Header{"Accept": {`Text/HTML; charset="utf-8", a/b;q=0.0, c/d;q=0.5`, ", ;, e/f;q=x,*/*;q=0"}}
	if got, want := gateway.Accepted(h), []string{"text/html", "c/d", "e/f"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if got := gateway.Accepted(http.Header{}); got != nil {
		t.Errorf("no header: got %q", got)
	}
}
