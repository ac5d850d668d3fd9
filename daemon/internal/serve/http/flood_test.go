package http_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
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

// soaking says that the full counts are to be run.
func soak() bool { return os.Getenv("MSB_SOAK") == "1" }

// slowClients are connections that keep the server waiting, each kind in its way.
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
			t.Fatalf("%d descriptors are needed, %d allowed: raise the limit (ulimit -n): %v", need, limit.Cur, err)
		}
	}
	head := func(key string) string {
		return "POST " + rpc.Path + " HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nAuthorization: " + key + "\r\n"
	}
	key := s.Issue(t, keys.IssueRequest{})
	kinds := []string{
		"", // says nothing
		head(key) + "X: " + strings.Repeat("x", gateway.MaxHeader-500), // long headers that do not end
		head(key), // and goes on byte by byte
		head(key) + "Content-Length: 1048576\r\n\r\n" + strings.Repeat(" ", 32<<10),                   // a long body that stops
		head("") + "Content-Length: 1048576\r\n\r\n",                                                  // the same without a key
		"GET " + rpc.HealthPath + " HTTP/1.1\r\nHost: x\r\n\r\n",                                      // an answer, and then nothing more
		head("msb_v2.public."+strings.Repeat("A", 2000)) + "Expect: 100-continue\r\nX: y\r\n\r\n\x16", // nonsense
	}
	c := &slowClients{done: make(chan struct{})}
	var dribbling []net.Conn
	for i := range n {
		conn, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		c.conns = append(c.conns, conn)
		io.WriteString(conn, kinds[i%len(kinds)])
		if i%len(kinds) == 2 {
			dribbling = append(dribbling, conn)
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
				for _, conn := range dribbling {
					io.WriteString(conn, "x")
				}
			}
		}
	})
	return c
}

// wait returns when the server has cut every connection.
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

// forge is a key that no one made, and that only its signature gives away.
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

// traffic is a number of clients of one kind.
type traffic struct {
	s         *Site
	addr      string
	transport *http.Transport
}

func newTraffic(s *Site, addr string, clients int) *traffic {
	return &traffic{s, addr, &http.Transport{MaxIdleConnsPerHost: clients}}
}

func (tr *traffic) send(key, body string) (status int, answer string, err error) {
	r, err := http.NewRequest(http.MethodPost, "http://"+tr.addr+rpc.Path, strings.NewReader(body))
	if err != nil {
		return 0, "", err
	}
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Authorization", "Bearer "+key)
	// So that the client tries again where the server closes an idle connection in that moment.
	r.Header["Idempotency-Key"] = nil
	res, err := tr.transport.RoundTrip(r)
	if err != nil {
		return 0, "", err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return res.StatusCode, string(text), err
}

// good sends a call and checks that it is answered as it should be.
func (tr *traffic) sendGood(n int) error {
	code := fmt.Sprint("code", n)
	status, answer, err := tr.send(tr.s.Key, Request("sandbox.repl.run", `{"sandbox":"a","language":"python","code":"`+code+`"}`))
	if err != nil || status != http.StatusOK || !strings.Contains(answer, `"python: `+code+`"`) {
		return fmt.Errorf("a good request is answered with %d %s, %v", status, answer, err)
	}
	return nil
}

// bad sends a forged key and checks that it is refused.
func (tr *traffic) sendForged(n int) (status int, err error) {
	status, answer, err := tr.send(forgeKey(tr.s.Key, n), Request("sandbox.stop", `{"sandbox":"a"}`))
	if err == nil && status != http.StatusUnauthorized && status != http.StatusTooManyRequests {
		err = fmt.Errorf("a forged key is answered with %d %s", status, answer)
	}
	return status, err
}

// memoryBytes is how much memory the process has from the operating system; what the race detector
// adds is not in it.
func memoryBytes() int {
	samples := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(samples)
	return int(samples[0].Value.Uint64() - samples[1].Value.Uint64())
}

// TestFlood lets good clients work while others keep thousands of connections waiting and send ten
// times as many forged keys from the same address: every good call is answered, the memory is bounded,
// and whoever keeps the server waiting is cut.
func TestFlood(t *testing.T) {
	slow, good, each := 1000, 8, 50
	s := New(t, func(o *Setup) { o.Log = slog.New(slog.DiscardHandler) })
	if soak() {
		slow, each = 5000, 1000 // and the real limits of time
	} else {
		s.HTTPServer().ReadHeaderTimeout, s.HTTPServer().ReadTimeout, s.HTTPServer().IdleTimeout = 3*time.Second, 5*time.Second, 5*time.Second
	}
	WantOK(t, s.Post(Request("sandbox.start", `{"sandbox":"a"}`)))
	addr, stop := s.Listen(t)
	defer stop()
	tr := newTraffic(s, addr, 11*good)
	defer tr.transport.CloseIdleConnections()
	if err := tr.sendGood(0); err != nil { // a key that is known to be good is not held up by the bad ones
		t.Fatal(err)
	}
	debug.FreeOSMemory()
	before := memoryBytes()

	slowConns := openSlowClients(t, s, addr, slow)
	defer slowConns.close()
	var wg sync.WaitGroup
	var goodCalls, refused, held atomic.Int64
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
				switch status, err := tr.sendForged(i*each + n); {
				case err != nil:
					t.Error(err)
					return
				case status == http.StatusTooManyRequests:
					held.Add(1)
				default:
					refused.Add(1)
				}
			}
		})
	}
	wg.Wait()
	grown := memoryBytes() - before
	if n := goodCalls.Load(); n != int64(good*each) {
		t.Errorf("%d of %d good calls were answered", n, good*each)
	}
	if refused.Load() == 0 || held.Load() == 0 {
		t.Errorf("of the forged keys %d were refused and %d not looked at", refused.Load(), held.Load())
	}
	// Clients included, which are in this process.
	if most := 256 << 20; grown > most {
		t.Errorf("the process has grown by %d MiB", grown>>20)
	}
	t.Logf("%d slow connections, %d good calls, %d forged keys (%d looked at): memory grew by %d MiB",
		slow, goodCalls.Load(), refused.Load()+held.Load(), refused.Load(), grown>>20)

	slowConns.wait()
	tr.transport.CloseIdleConnections()
	stop()
	s.WaitForConnections()
	if n := s.InFlightKeys(); n != 0 {
		t.Errorf("%d keys still have requests in flight", n)
	}
}

// BenchmarkFlood measures good calls, 200 a second, alone and then beside slow connections and ten times
// as many forged keys. With MSB_SOAK=1 there are 5,000 slow connections, else 1,000.
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
	// paced calls send at a steady rate until ctx ends, and waits for the last.
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
	measure := func() (took []time.Duration) {
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
			took = append(took, time.Since(began))
		})
		slices.Sort(took)
		return took
	}
	for range b.N {
		alone := measure()
		slowConns := openSlowClients(b, s, addr, slow)
		ctx, cancel := context.WithCancel(context.Background())
		var wg sync.WaitGroup
		wg.Go(func() {
			paced(ctx, 10*perSecond, func(n int) {
				if _, err := tr.sendForged(n); err != nil {
					b.Error(err)
				}
			})
		})
		beside := measure()
		cancel()
		wg.Wait()
		slowConns.close()
		at := func(took []time.Duration, q float64) float64 {
			return took[int(q*float64(len(took)-1))].Seconds() * 1000
		}
		b.ReportMetric(0, "ns/op")
		b.ReportMetric(at(alone, .5), "alone-p50-ms")
		b.ReportMetric(at(alone, .99), "alone-p99-ms")
		b.ReportMetric(at(beside, .5), "flood-p50-ms")
		b.ReportMetric(at(beside, .99), "flood-p99-ms")
		b.ReportMetric(at(beside, .99)/at(alone, .99), "p99-ratio")
	}
}
