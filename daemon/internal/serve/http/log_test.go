package http_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"net/http"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// Every call and every refused request is logged as one line with the same attributes.
func TestAccessLog(t *testing.T) {
	var log *LogBuffer
	s := New(t, func(o *Setup) {
		log = &LogBuffer{}
		o.Log = slog.New(slog.NewJSONHandler(log, nil))
	})
	key, id := s.IssueNamed(t, keys.IssueRequest{Namespaces: []string{"team-alpha", "team-beta"}, Scopes: []keys.Scope{keys.ScopeStart, keys.ScopeRead}})
	global, globalID := s.IssueNamed(t, keys.IssueRequest{})
	const canary = "canary7f3a"
	type line map[string]any
	for _, c := range []struct {
		name, body string
		changes    []func(*http.Request)
		want       []line // without time, request_id, source and duration
	}{
		{"call", Request("sandbox.start", `{"sandbox":"a","namespace":"team-beta","config":{"envs":["X=`+canary+`"]}}`), []func(*http.Request){WithKey(key)},
			[]line{{"level": "INFO", "msg": "call", "method": "sandbox.start", "namespace": "team-beta", "key_id": id, "status": 200.}}},
		{"all namespaces of a key", Request("sandbox.metrics.get", `{"namespace":"*"}`), []func(*http.Request){WithKey(key)},
			[]line{{"level": "INFO", "msg": "call", "method": "sandbox.metrics.get", "namespace": "team-alpha,team-beta", "key_id": id, "status": 200.}}},
		{"all namespaces", Request("sandbox.metrics.get", `{"namespace":"*"}`), []func(*http.Request){WithKey(global)},
			[]line{{"level": "INFO", "msg": "call", "method": "sandbox.metrics.get", "namespace": "*", "key_id": globalID, "status": 200.}}},
		{"batch", "[" + Request("rpc.discover", "{}") + "," + Request(canary, "{}") + "," + Request("sandbox.stop", `{"sandbox":"`+canary+`"}`) + "]", []func(*http.Request){WithKey(global)},
			[]line{
				{"level": "INFO", "msg": "call", "method": "rpc.discover", "namespace": "", "key_id": globalID, "status": 200.},
				{"level": "INFO", "msg": "call", "method": "unknown", "namespace": "", "key_id": globalID, "status": 404., "code": -32601.},
				{"level": "INFO", "msg": "call", "method": "sandbox.stop", "namespace": "default", "key_id": globalID, "status": 404., "code": -32003.},
			}},
		{"bad params", Request("sandbox.start", `{"sandbox":"`+canary+`/","`+canary+`":1}`), []func(*http.Request){WithKey(global)},
			[]line{{"level": "INFO", "msg": "call", "method": "sandbox.start", "namespace": "", "key_id": globalID, "status": 400., "code": -32602.}}},
		{"denied", Request("sandbox.stop", `{"sandbox":"`+canary+`"}`), []func(*http.Request){WithKey(key)},
			[]line{{"level": "INFO", "msg": "call", "method": "sandbox.stop", "namespace": "", "key_id": id, "status": 403., "code": -32004.,
				"err": "sandbox.stop needs a key with the scope sandbox:stop: permission denied"}}},
		{"internal error", Request("sandbox.stop", `{"sandbox":"broken"}`), []func(*http.Request){WithKey(global)},
			[]line{{"level": "ERROR", "msg": "call", "method": "sandbox.stop", "namespace": "default", "key_id": globalID, "status": 500., "code": -32603.,
				"err": "dial unix /run/secret/path: timeout"}}},
		{"full sandbox", Request("sandbox.fs.write", `{"sandbox":"a","namespace":"team-beta","path":"/full/`+canary+`","content":"x"}`), []func(*http.Request){WithKey(global)},
			[]line{{"level": "INFO", "msg": "call", "method": "sandbox.fs.write", "namespace": "team-beta", "key_id": globalID, "status": 429., "code": -32006.}}},
		{"metrics", "", []func(*http.Request){WithKey(global), At(http.MethodGet, rpc.MetricsPath)},
			[]line{{"level": "INFO", "msg": "call", "method": "/metrics", "namespace": "", "key_id": globalID, "status": 200.}}},
		{"not strict JSON", `{"` + canary + `":1,"` + canary + `":2}`, []func(*http.Request){WithKey(global)},
			[]line{{"level": "INFO", "msg": "request refused", "path": rpc.Path, "key_id": globalID, "status": 400., "err": "the body is not strict JSON, or holds no calls or too many"}}},
		{"bad key", "{}", []func(*http.Request){WithKey("Bearer msb_" + canary)},
			[]line{{"level": "INFO", "msg": "request refused", "path": rpc.Path, "key_id": "", "status": 401., "err": "token refused: not of the form msb_v2.public.PAYLOAD.FOOTER"}}},
		{"no key", "{}", []func(*http.Request){WithKey("")},
			[]line{{"level": "INFO", "msg": "request refused", "path": rpc.Path, "key_id": "", "status": 401., "err": gateway.ErrNoKey.Message}}},
		{"no such path", "", []func(*http.Request){At(http.MethodGet, "/"+canary)},
			[]line{{"level": "INFO", "msg": "request refused", "path": "other", "key_id": "", "status": 404., "err": "there is nothing at this path; send requests to /api/v1/rpc"}}},
		{"health", "", []func(*http.Request){At(http.MethodGet, rpc.HealthPath)}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			log.Reset()
			w := s.Post(c.body, c.changes...)
			if strings.Contains(log.String(), canary) {
				t.Error("the log contains text that the client sent:", log)
			}
			var got []line
			for text := range bytes.Lines([]byte(log.String())) {
				var l line
				if err := json.Unmarshal(text, &l); err != nil {
					t.Fatal(err)
				}
				if l["request_id"] != w.Header().Get("X-Request-Id") || l["source"] != "192.0.2.1:1234" || l["duration"] == nil || l["time"] == nil {
					t.Errorf("line lacks the request id, the source, the duration or the time: %s", text)
				}
				for _, name := range []string{"request_id", "source", "duration", "time"} {
					delete(l, name)
				}
				got = append(got, l)
			}
			if len(got) != len(c.want) {
				t.Fatalf("log has %d lines, want %d: %s", len(got), len(c.want), log)
			}
			for i := range got {
				want, _ := json.Marshal(c.want[i], json.Deterministic(true))
				if got, _ := json.Marshal(got[i], json.Deterministic(true)); string(got) != string(want) {
					t.Errorf("line %d is %s, want %s", i, got, want)
				}
			}
		})
	}
}

// Log lines about requests without a valid key are rate limited, because anyone can send such requests and fill the disk.
func TestRefusalLogIsRateLimited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(t)
		flood := func() int {
			s.Log.Reset()
			for range gateway.StrangersBurst + 100 {
				s.Post("{}", WithKey(""))
				s.Post("", At(http.MethodGet, "/nothing"))
			}
			return strings.Count(s.Log.String(), "msg=\"request refused\"")
		}
		if n := flood(); n != gateway.StrangersBurst {
			t.Errorf("the flood wrote %d log lines, want %d", n, gateway.StrangersBurst)
		}
		time.Sleep(time.Second)
		if n := flood(); n != gateway.StrangersPerSecond {
			t.Errorf("a second later, the flood wrote %d log lines, want %d", n, gateway.StrangersPerSecond)
		}
		// Requests with a valid key have limits of their own.
		s.Post("{", func(*http.Request) {})
		WantOK(t, s.Post(Request("sandbox.metrics.get", "{}")))
		if log := s.Log.String(); !strings.Contains(log, "strict JSON") || !strings.Contains(log, "msg=call") {
			t.Error("requests with a valid key are not in the log")
		}
	})
}

var responsesMetric = regexp.MustCompile(`(?m)^msbd_http_requests_total\{.*\} (\d+)$`)

// The log lines about the requests of one key are rate limited, whatever the requests are, and a line says how many were
// left out. The metrics count all of them, and other keys are not affected.
func TestLogOfOneKeyIsRateLimited(t *testing.T) {
	const requests = 3000
	denied, discover := Request("sandbox.stop", `{"sandbox":"a"}`), Request("rpc.discover", "{}")
	for _, c := range []struct {
		name, body string
		lines      int // how many lines one request would write without a limit
		maxLines   int
		change     func(*http.Request)
	}{
		{"refused calls", denied, 1, gateway.RefusalsBurst, nil},
		{"refused batches", "[" + strings.Repeat(denied+",", 9) + denied + "]", 10, gateway.RefusalsBurst, nil},
		{"unknown methods", Request("nothing", "{}"), 1, gateway.RefusalsBurst, nil},
		{"not JSON", "{", 1, gateway.RefusalsBurst, nil},
		{"wrong type", "{}", 1, gateway.RefusalsBurst, WithHeader("Content-Type", "text/plain")},
		{"refused path", "", 1, gateway.RefusalsBurst, At(http.MethodGet, rpc.MetricsPath)},
		{"above the rate", Request("nothing", "{}"), 1, gateway.RefusalsBurst, nil},
		{"successes", discover, 1, gateway.SuccessesBurst, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := New(t, func(o *Setup) {
					if c.name == "above the rate" {
						o.RequestsPerSecond = 1
					}
				})
				weak, id := s.IssueNamed(t, keys.IssueRequest{Scopes: []keys.Scope{keys.ScopeRead}})
				send := func() {
					changes := []func(*http.Request){WithKey(weak)}
					if c.change != nil {
						changes = append(changes, c.change)
					}
					s.Post(c.body, changes...)
				}
				s.Log.Reset()
				send()
				first := len(s.Log.String())
				for range requests - 1 {
					send()
				}
				log := s.Log.String()
				if n := strings.Count(log, "\n"); n != c.maxLines {
					t.Errorf("the flood wrote %d lines, want %d", n, c.maxLines)
				}
				if most := (first/c.lines + 100) * c.maxLines; len(log) > most {
					t.Errorf("the flood wrote %d bytes, want at most %d", len(log), most)
				}
				if WantOK(t, s.Post(Request("sandbox.metrics.get", "{}"))); s.Log.String() == log {
					t.Error("a call of another key is not in the log")
				}
				s.Log.Reset()
				time.Sleep(gateway.LeftOutInterval)
				synctest.Wait()
				if want := fmt.Sprintf("key_id=%s left_out=%d\n", id, requests*c.lines-c.maxLines); !strings.HasSuffix(s.Log.String(), want) {
					t.Errorf("the log does not end with %q: %s", want, s.Log)
				}
				counted := 0
				for _, match := range responsesMetric.FindAllStringSubmatch(s.Post("", At(http.MethodGet, rpc.MetricsPath)).Body.String(), -1) {
					n, _ := strconv.Atoi(match[1])
					counted += n
				}
				if counted != requests+1 {
					t.Errorf("the metrics count %d responses, want %d", counted, requests+1)
				}
			})
		})
	}
}
