package http_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

func withRate(perSecond float64) func(*Setup) {
	return func(o *Setup) { o.RequestsPerSecond = perSecond }
}

// wantWait checks that a response is a 429, and returns how long the client should wait.
func wantWait(t *testing.T, w *httptest.ResponseRecorder) time.Duration {
	t.Helper()
	e := WantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
	seconds, err := strconv.Atoi(w.Header().Get("Retry-After"))
	if err != nil || seconds < 1 || e.Data == nil || e.Data.RetryAfter != seconds {
		t.Fatalf("Retry-After is %q and the error's data %+v, want the same number of at least 1", w.Header().Get("Retry-After"), e.Data)
	}
	return time.Duration(seconds) * time.Second
}

func TestRate(t *testing.T) {
	for _, c := range []struct {
		perSecond float64
		burst     int
		wait      time.Duration
	}{{1, 1, time.Second}, {2.5, 3, time.Second}, {50, 50, time.Second}, {0.1, 1, 10 * time.Second}} {
		t.Run(fmt.Sprint(c.perSecond), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := New(t, withRate(c.perSecond))
				other := s.Issue(t, keys.IssueRequest{})
				call := Request("sandbox.metrics.get", "{}")
				for range c.burst {
					WantOK(t, s.Post(call))
				}
				for range 5 { // refused requests do not count
					if wait := wantWait(t, s.Post(call)); wait != c.wait {
						t.Fatalf("response asks to wait %s, want %s", wait, c.wait)
					}
				}
				WantOK(t, s.Post(call, WithKey(other)))
				if c.wait > time.Second {
					time.Sleep(c.wait - time.Second)
					if wait := wantWait(t, s.Post(call)); wait != time.Second {
						t.Fatalf("response asks to wait another %s, want 1s", wait)
					}
					time.Sleep(time.Second)
				} else {
					time.Sleep(c.wait)
				}
				WantOK(t, s.Post(call))
			})
		})
	}
}

// A batch runs completely, even if it exceeds the limit. All its calls count, so that later calls have to wait longer.
func TestRateOfBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(t, withRate(2))
		call := Request("sandbox.metrics.get", "{}")
		note := `{"jsonrpc":"2.0","method":"sandbox.metrics.get"}`
		batch := "[" + strings.Repeat(call+","+note+",1,", 6) + call + "]" // 19 members
		if w := s.Post(batch); w.Code != http.StatusOK || strings.Contains(w.Body.String(), "-32006") {
			t.Fatalf("response is %d %s, want 200 without an error about the limit", w.Code, w.Body)
		}
		// 2 calls were available and the batch took 19, so that -17 are left. At 2 calls per second, it takes 9 s until
		// 1 call is available.
		wait := wantWait(t, s.Post(batch))
		if wait != 9*time.Second {
			t.Fatalf("response asks to wait %s, want 9s", wait)
		}
		time.Sleep(wait)
		WantOK(t, s.Post(call))
		wantWait(t, s.Post(call))
	})
}

// Every request with a key counts, even an invalid one. Health checks do not count.
func TestRateCountsAllRequestsWithKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(t, withRate(1))
		for name, send := range map[string]func() *httptest.ResponseRecorder{
			"metrics":    func() *httptest.ResponseRecorder { return s.Post("", At(http.MethodGet, rpc.MetricsPath)) },
			"discover":   func() *httptest.ResponseRecorder { return s.Post(Request(rpc.MethodDiscover, "{}")) },
			"no JSON":    func() *httptest.ResponseRecorder { return s.Post("{") },
			"plain text": func() *httptest.ResponseRecorder { return s.Post("{}", WithHeader("Content-Type", "text/plain")) },
			"alias": func() *httptest.ResponseRecorder {
				return s.Post(Request("sandbox.metrics.get", "{}"), At(http.MethodPost, rpc.StopPath))
			},
		} {
			if w := send(); w.Code == http.StatusTooManyRequests {
				t.Errorf("%s: first request was over the limit: %s", name, w.Body)
			}
			wantWait(t, send())
			if w := s.Post("", At(http.MethodGet, rpc.HealthPath)); w.Code != http.StatusOK {
				t.Errorf("health: response is %d, want 200", w.Code)
			}
			time.Sleep(time.Second)
		}
	})
}
