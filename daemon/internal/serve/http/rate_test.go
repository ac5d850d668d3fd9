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

// wantWait checks that an answer is 429, and returns how many seconds it says to wait.
func wantWait(t *testing.T, w *httptest.ResponseRecorder) time.Duration {
	t.Helper()
	e := WantError(t, w, http.StatusTooManyRequests, rpc.CodeExhausted)
	seconds, err := strconv.Atoi(w.Header().Get("Retry-After"))
	if err != nil || seconds < 1 || e.Data == nil || e.Data.RetryAfter != seconds {
		t.Fatalf("Retry-After is %q, the error's data %+v", w.Header().Get("Retry-After"), e.Data)
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
				for range 5 { // who is refused pays nothing
					if wait := wantWait(t, s.Post(call)); wait != c.wait {
						t.Fatalf("is to wait for %s, want %s", wait, c.wait)
					}
				}
				WantOK(t, s.Post(call, WithKey(other)))
				if c.wait > time.Second {
					time.Sleep(c.wait - time.Second)
					if wait := wantWait(t, s.Post(call)); wait != time.Second {
						t.Fatalf("is to wait for another %s", wait)
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

// A batch is run whole. Its members count all the same: the calls after it wait for longer.
func TestRateOfBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(t, withRate(2))
		call := Request("sandbox.metrics.get", "{}")
		note := `{"jsonrpc":"2.0","method":"sandbox.metrics.get"}`
		batch := "[" + strings.Repeat(call+","+note+",1,", 6) + call + "]" // of 19
		if w := s.Post(batch); w.Code != http.StatusOK || strings.Contains(w.Body.String(), "-32006") {
			t.Fatalf("answer is %d %s", w.Code, w.Body)
		}
		// Of the 2 that there were it took 19: until there is 1 again, it takes 9 s.
		wait := wantWait(t, s.Post(batch))
		if wait != 9*time.Second {
			t.Fatalf("is to wait for %s", wait)
		}
		time.Sleep(wait)
		WantOK(t, s.Post(call))
		wantWait(t, s.Post(call))
	})
}

// Everything that needs a key counts, what is wrong in itself too; a health check does not.
func TestWhatCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := New(t, withRate(1))
		for name, ask := range map[string]func() *httptest.ResponseRecorder{
			"metrics":    func() *httptest.ResponseRecorder { return s.Post("", At(http.MethodGet, rpc.MetricsPath)) },
			"discover":   func() *httptest.ResponseRecorder { return s.Post(Request(rpc.MethodDiscover, "{}")) },
			"no JSON":    func() *httptest.ResponseRecorder { return s.Post("{") },
			"plain text": func() *httptest.ResponseRecorder { return s.Post("{}", WithHeader("Content-Type", "text/plain")) },
			"alias": func() *httptest.ResponseRecorder {
				return s.Post(Request("sandbox.metrics.get", "{}"), At(http.MethodPost, rpc.StopPath))
			},
		} {
			if w := ask(); w.Code == http.StatusTooManyRequests {
				t.Errorf("%s: refused: %s", name, w.Body)
			}
			wantWait(t, ask())
			if w := s.Post("", At(http.MethodGet, rpc.HealthPath)); w.Code != http.StatusOK {
				t.Errorf("health: %d", w.Code)
			}
			time.Sleep(time.Second)
		}
	})
}
