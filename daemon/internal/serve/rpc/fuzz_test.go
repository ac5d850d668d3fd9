package rpc_test

import (
	"bufio"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
	serverpc "github.com/msbd/msbd/daemon/internal/serve/rpc"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// FuzzRPC holds every answer to the envelope, whatever the body: JSON, one of result and error, a
// status that goes with it, and no panic behind it.
func FuzzRPC(f *testing.F) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		text, err := os.Open(file)
		if err != nil {
			f.Fatal(err)
		}
		for lines := bufio.NewScanner(text); lines.Scan(); {
			if body, ok := strings.CutPrefix(lines.Text(), "> "); ok {
				f.Add([]byte(body))
			}
		}
		text.Close()
	}
	s := New(f)
	f.Fuzz(func(t *testing.T, body []byte) {
		clear(s.Sandboxes.Running)
		s.Log.Reset()
		w := s.Post(string(body))
		if strings.Contains(s.Log.String(), "panic") && !strings.Contains(s.Log.String(), "a fault of the domain") {
			t.Fatalf("panic: %s", s.Log)
		}
		if w.Code == http.StatusNoContent {
			if w.Body.Len() != 0 || !jsontext.Value(body).IsValid() {
				t.Fatalf("204 with %q to %q", w.Body, body)
			}
			return
		}
		answer := jsontext.Value(w.Body.Bytes())
		var all []rpc.Response
		if answer.Kind() == '[' {
			if err := json.Unmarshal(answer, &all, json.RejectUnknownMembers(true)); err != nil || len(all) == 0 || w.Code != http.StatusOK {
				t.Fatalf("%d %s: %v", w.Code, answer, err)
			}
		} else {
			var one rpc.Response
			if err := json.Unmarshal(answer, &one, json.RejectUnknownMembers(true)); err != nil || (w.Code == http.StatusOK) != (one.Error == nil) {
				t.Fatalf("%d %s: %v", w.Code, answer, err)
			}
			all = []rpc.Response{one}
		}
		// What runs is strict JSON by the library's word, too.
		strict := jsontext.Value(body).IsValid() && serverpc.Depth(body) <= rpc.MaxDepth
		if parsed := all[0].Error == nil || all[0].Error.Code != rpc.CodeParse; parsed != strict {
			t.Fatalf("%q is strict JSON: %v, but is answered with %s", body, strict, answer)
		}
		for _, res := range all {
			if res.JSONRPC != rpc.Version || (res.Result == nil) == (res.Error == nil) || res.ID == nil {
				t.Fatalf("%s is no response", answer)
			}
		}
	})
}
