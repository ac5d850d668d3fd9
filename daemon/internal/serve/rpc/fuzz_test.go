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
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	serverpc "github.com/msbd/msbd/daemon/internal/serve/rpc"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// FuzzRPC checks that every body gets a valid JSON-RPC response: JSON with either a result or an error, a matching HTTP
// status, and no panic. As a stream of events, the response ends with a result or an error.
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
	s.Sandboxes.Changes = make(chan sandbox.FileChange)
	close(s.Sandboxes.Changes)
	f.Fuzz(func(t *testing.T, body []byte) {
		clear(s.Sandboxes.Running)
		s.Log.Reset()
		if w := s.Post(string(body), asEvents); w.Header().Get("Content-Type") == rpc.EventStream {
			all := eventsOf(t, w)
			for i, e := range all {
				if last := i == len(all)-1; (e.name == rpc.EventResult || e.name == rpc.EventError) != last || !jsontext.Value(e.data).IsValid() {
					t.Fatalf("event %d of %d is %+v", i, len(all), e)
				}
			}
		}
		clear(s.Sandboxes.Running)
		w := s.Post(string(body))
		if strings.Contains(s.Log.String(), "panic") && !strings.Contains(s.Log.String(), "a fault of the domain") {
			t.Fatalf("panic: %s", s.Log)
		}
		if w.Code == http.StatusNoContent {
			if w.Body.Len() != 0 || !jsontext.Value(body).IsValid() {
				t.Fatalf("got 204 with body %q for request %q", w.Body, body)
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
		// The JSON library agrees that everything that was parsed is strict JSON.
		strict := jsontext.Value(body).IsValid() && serverpc.Depth(body) <= rpc.MaxDepth
		if parsed := all[0].Error == nil || all[0].Error.Code != rpc.CodeParse; parsed != strict {
			t.Fatalf("%q: strict JSON %t, but got %s", body, strict, answer)
		}
		for _, res := range all {
			if res.JSONRPC != rpc.Version || (res.Result == nil) == (res.Error == nil) || res.ID == nil {
				t.Fatalf("%s is not a valid response", answer)
			}
		}
	})
}
