package gateway

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/rpcerr"
)

// docs/api.md is written by hand; what it says must be what the table and the codes say.
func TestAPIDocsAreComplete(t *testing.T) {
	data, err := os.ReadFile("../../../docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(data)
	for _, m := range newSite(t).table() {
		_, section, found := strings.Cut(doc, "\n## "+m.name+"\n")
		if !found {
			t.Errorf("%s is not described", m.name)
			continue
		}
		section, _, _ = strings.Cut(section, "\n## ")
		for _, p := range m.params {
			if !strings.Contains(section, fmt.Sprintf("\n| `%s` |", p.name)) {
				t.Errorf("%s: param %s is not described", m.name, p.name)
			}
		}
		if scope := fmt.Sprintf("| `%s` |", m.scope); !strings.Contains(doc, scope) {
			t.Errorf("scope %s is not described", m.scope)
		}
	}
	for _, c := range rpc.Codes {
		statuses := strings.Trim(strings.Join(strings.Fields(fmt.Sprint(c.Status)), ", "), "[]")
		if row := fmt.Sprintf("\n| %s | %d | %s | %s |\n", statuses, c.Code, c.Meaning, c.Remedy); !strings.Contains(doc, row) {
			t.Errorf("this row is missing:%s", row)
		}
	}
}

func TestEveryCodeIsDescribed(t *testing.T) {
	described := map[rpc.Code]bool{}
	for _, c := range rpc.Codes {
		described[c.Code] = true
		if got := rpcerr.HTTPStatus(c.Code); got != c.Status[0] {
			t.Errorf("code %d is described with HTTP status %d, and is sent with %d", c.Code, c.Status[0], got)
		}
	}
	for _, code := range []rpc.Code{
		rpc.CodeParse, rpc.CodeInvalidRequest, rpc.CodeMethodNotFound, rpc.CodeInvalidParams, rpc.CodeInternal, rpc.CodeUnauthenticated,
		rpc.CodeNotFound, rpc.CodePermissionDenied, rpc.CodeConflict, rpc.CodeExhausted, rpc.CodeRunTimeout, rpc.CodeCommandNotFound,
		rpc.CodeUnavailable,
	} {
		if !described[code] {
			t.Errorf("code %d is not described", code)
		}
	}
}
