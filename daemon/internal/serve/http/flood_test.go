package http_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// soak reports whether the test should run with its full numbers and timeouts (MSB_SOAK=1).
func soak() bool { return os.Getenv("MSB_SOAK") == "1" }

// slowClients are connections that keep the server waiting, in different ways.
type slowClients struct {
	conns []net.Conn
	done  chan struct{}
	wg    sync.WaitGroup
}

func openSlowClients(t testing.TB, s *Site, addr string, n int) *slowClients {
	t.Helper()
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	if need := uint64(2*n + 1000); limit.Cur < need {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: need, Max: max(need, limit.Max)}); err != nil {
			t.Fatalf("the test needs %d file descriptors, but the limit is %d; raise it with ulimit -n: %v", need, limit.Cur, err)
		}
	}
	head := func(key string) string {
		return "POST " + rpc.Path + " HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: " + key + "\r\n"
	}
	key := s.Issue(t, keys.IssueRequest{})
	kinds := []string{
		"", // sends nothing
		head(key) + "X: " + strings.Repeat("x", gateway.MaxHeader-500), // long headers that do not end
		head(key), // then sends one byte of a header at a time
		head(key) + "Content-Length: 1048576\r\n\r\n" + strings.Repeat(" ", 32<<10),                   // a long body that stops
		head("") + "Content-Length: 1048576\r\n\r\n",                                                  // no key, and a body that does not begin
		"GET " + rpc.HealthPath + " HTTP/1.1\r\nHost: x\r\n\r\n",                                      // a complete request, then idle
		head("msb_v2.public."+strings.Repeat("A", 2000)) + "Expect: 100-continue\r\nX: y\r\n\r\n\x16", // an invalid key, then garbage
	}
	c := &slowClients{done: make(chan struct{})}
	var byteByByte []net.Conn
	for i := range n {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c.conns = append(c.conns, conn)
		io.WriteString(conn, kinds[i%len(kinds)])
		if i%len(kinds) == 2 {
			byteByByte = append(byteByByte, conn)
		}
	}
	c.wg.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-c.done:
				return
			case <-tick.C:
				for _, conn := range byteByByte {
					io.WriteString(conn, "x")
				}
			}
		}
	})
	return c
}

// wait returns when the server has closed every connection.
func (c *slowClients) wait() {
	for _, conn := range c.conns {
		io.Copy(io.Discard, conn)
	}
}

func (c *slowClients) close() {
	close(c.done)
	c.wg.Wait()
	for _, conn := range c.conns {
		conn.Close()
	}
}

// forgeKey returns a key that differs from key only in its signature, which is invalid. It differs for each n.
func forgeKey(key string, n int) string {
	parts := strings.Split(key, ".")
	signature := []byte(parts[2])
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	for i := range 4 {
		signature[len(signature)-60+i] = alphabet[n>>(6*i)&63]
	}
	signature[len(signature)-50] ^= 1
	parts[2] = string(signature)
	return strings.Join(parts, ".")
}

// traffic sends the requests of many clients to one site.
type traffic struct {
	s         *Site
	addr      string
	transport *http.Transport
}

func newTraffic(s *Site, addr string, clients int) *traffic {
	return &traffic{s, addr, &http.Transport{MaxIdleConnsPerHost: clients}}
}

func (tr *traffic) send(key, body string) (status int, response string, err error) {
	r, err := http.NewRequest(http.MethodPost, "http://"+tr.addr+rpc.Path, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer "+key)
	// With this, the transport retries the request if the server closes an idle connection at the same moment. The header
	// is not sent, because it has no values.
	r.Header["Idempotency-Key"] = nil
	res, err := tr.transport.RoundTrip(r)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return res.StatusCode, string(text), err
}

// sendGood sends a call with a valid key and checks the result.
func (tr *traffic) sendGood(n int) error {
	code := fmt.Sprint("code", n)
	status, response, err := tr.send(tr.s.Key, Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"`+code+`"}`))
	if err != nil || status != http.StatusOK || !strings.Contains(response, `"python: `+code+`"`) {
		return fmt.Errorf("valid key: response is %d %s, error %v; want 200 with the output", status, response, err)
	}
	return nil
}

// sendBad sends a call with a bad key and checks that it is refused.
func (tr *traffic) sendBad(key string) error {
	status, response, err := tr.send(key, Request("sandbox.stop", `{"sandbox":"a"}`))
	if err == nil && status != http.StatusUnauthorized {
		err = fmt.Errorf("bad key: response is %d %s, want 401", status, response)
	}
	return err
}

// memoryBytes returns how much memory the Go runtime holds from the operating system. It does not include the memory of
// the race detector.
func memoryBytes() int {
	samples := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(samples)
	return int(samples[0].Value.Uint64() - samples[1].Value.Uint64())
}

// TestFlood sends valid calls while other clients at the same address keep thousands of slow connections open and send
// ten times as many forged keys. Every valid call must succeed, the memory must stay within a limit, and the server must
// close the slow connections.
func TestFlood(t *testing.T) {
	slow, good, each := 1000, 8, 50
	s := New(t, func(o *Setup) { o.Log = slog.New(slog.DiscardHandler) })
	if soak() {
		slow, each = 5000, 1000 // with the real timeouts
	} else {
		s.HTTPServer().ReadHeaderTimeout, s.HTTPServer().ReadTimeout, s.HTTPServer().IdleTimeout = 3*time.Second, 5*time.Second, 5*time.Second
	}
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	addr, stop := s.Listen(t)
	defer stop()
	tr := newTraffic(s, addr, 11*good)
	defer tr.transport.CloseIdleConnections()
	debug.FreeOSMemory()
	before := memoryBytes()

	slowConns := openSlowClients(t, s, addr, slow)
	defer slowConns.close()
	var wg sync.WaitGroup
	var goodCalls, refused atomic.Int64
	for i := range good {
		wg.Go(func() {
			for n := range each {
				if err := tr.sendGood(i*each + n); err != nil {
					t.Error(err)
					return
				}
				goodCalls.Add(1)
			}
		})
	}
	for i := range 10 * good {
		wg.Go(func() {
			for n := range each {
				if err := tr.sendBad(forgeKey(s.Key, i*each+n)); err != nil {
					t.Error(err)
					return
				}
				refused.Add(1)
			}
		})
	}
	wg.Wait()
	grown := memoryBytes() - before
	if n := goodCalls.Load(); n != int64(good*each) {
		t.Errorf("%d of %d valid calls succeeded", n, good*each)
	}
	// This includes the memory of the clients, which are in this process.
	if limit := 256 << 20; grown > limit {
		t.Errorf("memory grew by %d MiB, want at most %d", grown>>20, limit>>20)
	}
	t.Logf("%d slow connections, %d valid calls, %d forged keys: memory grew by %d MiB", slow, goodCalls.Load(), refused.Load(), grown>>20)

	slowConns.wait()
	tr.transport.CloseIdleConnections()
	stop()
	s.WaitForConnections()
	if n := s.InFlightKeys(); n != 0 {
		t.Errorf("after all requests, %d keys still count as having requests in progress", n)
	}
}

// While clients at the same address send bad keys of every kind, a key that is created meanwhile works at once, and after
// a restart of the server, all keys still work.
func TestFloodOfBadKeys(t *testing.T) {
	s := New(t, func(o *Setup) { o.Log = slog.New(slog.DiscardHandler) })
	revoked, id := s.IssueNamed(t, keys.IssueRequest{})
	if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
		t.Fatal(err)
	}
	unused, alien := s.Issue(t, keys.IssueRequest{}), New(t).Key
	kinds := map[string]func(n int) string{
		"junk":            func(n int) string { return fmt.Sprint("junk", n) },
		"malformed":       func(n int) string { return fmt.Sprint("msb_v2.public.", strings.Repeat("A", 100+n%1000), ".AAAA") },
		"another server":  func(int) string { return alien },
		"revoked":         func(int) string { return revoked },
		"forged, in use":  func(n int) string { return forgeKey(s.Key, n) },
		"forged, unused":  func(n int) string { return forgeKey(unused, n) },
		"forged, revoked": func(n int) string { return forgeKey(revoked, n) },
	}

	var addr atomic.Pointer[string]
	listen := func(s *Site) (stop func()) {
		a, stop := s.Listen(t)
		addr.Store(&a)
		return stop
	}
	works := func(tr *traffic, key string) {
		t.Helper()
		if status, response, err := tr.send(key, Request("sandbox.metrics.get", "{}")); err != nil || status != http.StatusOK {
			t.Errorf("a valid key: response is %d %s, error %v", status, response, err)
		}
	}
	defer listen(s)()
	transport := &http.Transport{MaxIdleConnsPerHost: 2 * len(kinds)}
	var flood sync.WaitGroup
	done := make(chan struct{})
	var sent [16]atomic.Int64
	for i, kind := range slices.Sorted(maps.Keys(kinds)) {
		flood.Go(func() {
			for n := 0; ; n++ {
				select {
				case <-done:
					return
				default:
				}
				tr := &traffic{s, *addr.Load(), transport}
				if err := tr.sendBad(kinds[kind](n)); err != nil {
					t.Errorf("%s: %v", kind, err)
					return
				}
				sent[i].Add(1)
			}
		})
	}
	wait := func() { // until the flood has sent 50 more keys of each kind
		for i := range len(kinds) {
			for until := sent[i].Load() + 50; sent[i].Load() < until && !t.Failed(); {
				time.Sleep(time.Millisecond)
			}
		}
	}
	wait()
	good := []string{s.Key}
	for range 20 {
		key := s.Issue(t, keys.IssueRequest{})
		works(&traffic{s, *addr.Load(), transport}, key)
		good = append(good, key)
	}
	restarted := s.Restart(t) // the first server only stops at the end, so that no request fails
	defer listen(restarted)()
	wait()
	for _, key := range append(good, unused) {
		works(&traffic{restarted, *addr.Load(), transport}, key)
	}
	close(done)
	flood.Wait()
	transport.CloseIdleConnections() // the servers would wait for some of them when they stop
}

// BenchmarkFlood measures the latency of 200 valid calls per second, first alone and then during a flood of slow
// connections and ten times as many forged keys. There are 1,000 slow connections, or 5,000 with MSB_SOAK=1.
func BenchmarkFlood(b *testing.B) {
	const perSecond = 200
	slow := 1000
	if soak() {
		slow = 5000
	}
	s := New(b, func(o *Setup) { o.Log = slog.New(slog.DiscardHandler) })
	s.Post(Request("sandbox.start", `{"sandbox":"a"}`))
	addr, stop := s.Listen(b)
	defer stop()
	tr := newTraffic(s, addr, 256)
	defer tr.transport.CloseIdleConnections()
	// paced calls send at a steady rate until ctx ends, and then waits until all calls have returned.
	paced := func(ctx context.Context, perSecond int, send func(n int)) {
		var wg sync.WaitGroup
		defer wg.Wait()
		tick := time.NewTicker(time.Second / time.Duration(perSecond))
		defer tick.Stop()
		for n := 0; ; n++ {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				wg.Go(func() { send(n) })
			}
		}
	}
	measure := func() (latencies []time.Duration) {
		var mu sync.Mutex
		ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
		defer cancel()
		paced(ctx, perSecond, func(n int) {
			began := time.Now()
			if err := tr.sendGood(n); err != nil {
				b.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			latencies = append(latencies, time.Since(began))
		})
		slices.Sort(latencies)
		return latencies
	}
	for range b.N {
		alone := measure()
		slowConns := openSlowClients(b, s, addr, slow)
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() {
			paced(ctx, 10*perSecond, func(n int) {
				if err := tr.sendBad(forgeKey(s.Key, n)); err != nil {
					b.Error(err)
				}
			})
		})
		flooded := measure()
		cancel()
		wg.Wait()
		slowConns.close()
		quantile := func(latencies []time.Duration, q float64) float64 { // in milliseconds
			return latencies[int(q*float64(len(latencies)-1))].Seconds() * 1000
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(quantile(alone, .5), "alone-p50-ms")
		b.ReportMetric(quantile(alone, .99), "alone-p99-ms")
		b.ReportMetric(quantile(flooded, .5), "flood-p50-ms")
		b.ReportMetric(quantile(flooded, .99), "flood-p99-ms")
		b.ReportMetric(quantile(flooded, .99)/quantile(alone, .99), "p99-ratio")
	}
}
