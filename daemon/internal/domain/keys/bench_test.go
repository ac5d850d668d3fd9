package keys

import (
	"crypto/ed25519"
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
	"golang.org/x/crypto/bcrypt"

	"github.com/msbd/msbd/daemon/benchtest"
)

// runner is an operation to be timed.
type runner struct {
	name string
	// batch is how many times the operation is done between two readings of the clock. A batch should take some
	// 100 µs.
	batch int
	// most is the maximum number of batches. 0 means no limit.
	most int
	do   func()

	times []time.Duration // the average duration of one operation, for each batch
}

// compareTimes runs the runners in turn, so that other load on the machine affects all of them equally. It reports
// the p50 and p99 of the first, the p50 of the others, and the ratio of the first p50 to each of these.
func compareTimes(b *testing.B, runners ...*runner) {
	b.Helper()
	for b.Loop() {
		for _, r := range runners {
			if r.most > 0 && len(r.times) >= r.most {
				continue
			}
			start := time.Now()
			for range r.batch {
				r.do()
			}
			r.times = append(r.times, time.Since(start)/time.Duration(r.batch))
		}
	}
	b.ReportMetric(0, "ns/op") // hide the time for all runners together
	first := runners[0]
	b.ReportMetric(float64(first.quantile(0.5)), first.name+"-p50-ns")
	b.ReportMetric(float64(first.quantile(0.99)), first.name+"-p99-ns")
	for _, r := range runners[1:] {
		b.ReportMetric(float64(r.quantile(0.5)), r.name+"-p50-ns")
		b.ReportMetric(float64(first.quantile(0.5))/float64(r.quantile(0.5)), "ratio-to-"+r.name)
	}
}

func (r *runner) quantile(q float64) time.Duration {
	slices.Sort(r.times)
	return r.times[int(q*float64(len(r.times)-1))]
}

// must fails the benchmark if a timed operation did not give the expected result.
func must(b *testing.B, ok bool) {
	if !ok {
		b.Fatal("the timed operation has an unexpected result")
	}
}

// The cost of authenticating a request with a key that was used before, compared with golang-jwt and bcrypt.
func BenchmarkKnownKey(b *testing.B) {
	_, i, v := newIssuer(b)
	token, _ := issue(b, i, IssueRequest{Expire: "1h", Namespaces: []string{"team-alpha"}, Scopes: []Scope{ScopeExec}})
	secret := []byte(strings.Repeat("s", 32))
	signed, err := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.RegisteredClaims{
		Issuer: issuerName, Audience: jwt.ClaimStrings{randomID()}, ID: randomID(), Subject: "team-alpha",
		IssuedAt: jwt.NewNumericDate(time.Now()), ExpiresAt: jwt.NewNumericDate(time.Now().Add(time.Hour)),
	}).SignedString(secret)
	if err != nil {
		b.Fatal(err)
	}
	hash, err := bcrypt.GenerateFromPassword([]byte("password"), bcrypt.DefaultCost)
	if err != nil {
		b.Fatal(err)
	}
	verify := func() {
		_, err := v.Verify(token, from)
		must(b, err == nil)
	}
	compareTimes(b,
		&runner{name: "msbd", batch: 1000, do: verify},
		&runner{name: "golang-jwt-HS256", batch: 10, do: func() {
			_, err := jwt.ParseWithClaims(signed, new(jwt.RegisteredClaims), func(*jwt.Token) (any, error) { return secret, nil },
				jwt.WithValidMethods([]string{"HS256"}))
			must(b, err == nil)
		}},
		&runner{name: "bcrypt", batch: 1, most: 3, do: func() {
			must(b, bcrypt.CompareHashAndPassword(hash, []byte("password")) == nil)
		}})
	b.ReportMetric(testing.AllocsPerRun(100, verify), "msbd-allocs")
}

// The same, with requests that come from two addresses in turn.
func BenchmarkKnownKeyFromTwoSources(b *testing.B) {
	_, i, v := newIssuer(b)
	token, _ := issue(b, i, IssueRequest{})
	use := alternating(v, token)
	b.ReportAllocs()
	for b.Loop() {
		use()
	}
}

// The same on all CPUs at once: with one key for each CPU, and with a key that all of them use.
func BenchmarkKnownKeyParallel(b *testing.B) {
	_, i, v := newIssuer(b)
	shared, _ := issue(b, i, IssueRequest{})
	for _, own := range []bool{true, false} {
		b.Run(map[bool]string{true: "own keys", false: "one key"}[own], func(b *testing.B) {
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				token := shared
				if own {
					token, _ = issue(b, i, IssueRequest{})
				}
				for pb.Next() {
					if _, err := v.Verify(token, from); err != nil {
						b.Error(err)
					}
				}
			})
		})
	}
}

// The cost of the first request with a key, compared with the signature check, which it cannot avoid.
func BenchmarkFirstSight(b *testing.B) {
	_, i, v := newIssuer(b)
	token, r := issue(b, i, IssueRequest{Expire: "1h", Namespaces: []string{"team-alpha"}, Scopes: []Scope{ScopeExec}})
	ring := i.keyring.Load()
	payload, err := ring.payload(r)
	if err != nil {
		b.Fatal(err)
	}
	signature := ed25519.Sign(ed25519.PrivateKey(ring.private.Reveal()), payload)
	k := i.keys.byID[r.ID]
	compareTimes(b,
		&runner{name: "msbd", batch: 1, do: func() {
			_, err := v.Verify(token, from)
			must(b, err == nil)
			i.keys.mu.Lock()
			i.keys.closeSession(k, errForm)
			i.keys.mu.Unlock()
		}},
		&runner{name: "Ed25519", batch: 1, do: func() { must(b, ed25519.Verify(ring.public, payload, signature)) }})
}

// The cost of refusing a megabyte of dots, compared with the library's own parser.
func BenchmarkHostileToken(b *testing.B) {
	_, i, v := newIssuer(b)
	token := header + strings.Repeat(".", 1<<20)
	public := i.keyring.Load().public
	verify := func() {
		_, err := v.Verify(token, from)
		must(b, err != nil)
	}
	library := func() {
		must(b, parse(public, token[len(keyPrefix):], nil) != nil)
	}
	compareTimes(b, &runner{name: "msbd", batch: 1000, do: verify}, &runner{name: "library", batch: 1, do: library})
	b.ReportMetric(allocatedBytes(verify), "msbd-B")
	b.ReportMetric(allocatedBytes(library), "library-B")
}

// allocatedBytes returns how many bytes do allocates.
func allocatedBytes(do func()) float64 {
	do()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	do()
	runtime.ReadMemStats(&after)
	return float64(after.TotalAlloc - before.TotalAlloc)
}

// The cost of an authenticated request and of lookups with many keys, compared with few keys.
func BenchmarkManyKeys(b *testing.B) {
	type population struct {
		i      *Issuer
		v      *Verifier
		tokens []string // the tokens of 100 keys that have a session
		r      Record   // a key in the middle of the list
		page   string   // the position of r, after which a page begins
	}
	populate := func(n int) population {
		_, i, v := newIssuer(b)
		ring := i.keyring.Load()
		records := make([]Record, n)
		for at := range records {
			records[at] = Record{
				ID: randomID(), Name: fmt.Sprint("key-", at), CreatedAt: schema1Time(at), SigningKeyID: ring.keyID, Namespaces: []string{"a"},
			}
		}
		i.keys.put(records...)
		p := population{i: i, v: v, r: records[n/2], page: (&key{Record: records[n/2]}).position().String()}
		for at := range 100 {
			token, err := ring.sign(records[at*n/100])
			if err != nil {
				b.Fatal(err)
			}
			accepted(b, v, token.Reveal())
			p.tokens = append(p.tokens, token.Reveal())
		}
		return p
	}
	few := populate(100)
	for _, n := range []int{100, 1_000, 10_000, 100_000, 1_000_000} {
		many := populate(n)
		for _, bm := range []struct {
			name string
			do   func(p population, turn int) error
		}{
			{"verify", func(p population, turn int) error { _, err := p.v.Verify(p.tokens[turn%100], from); return err }},
			{"find by id", func(p population, _ int) error { _, err := p.i.Find(p.r.ID); return err }},
			{"find by name", func(p population, _ int) error { _, err := p.i.Find(p.r.Name); return err }},
			{"find by prefix", func(p population, _ int) error { _, err := p.i.Find(p.r.ID[:12]); return err }},
			{"page of 20", func(p population, _ int) error { _, _, err := p.i.List(Filter{}, p.page, 20); return err }},
		} {
			b.Run(fmt.Sprintf("%d/%s", n, bm.name), func(b *testing.B) {
				timed := func(name string, p population) *runner {
					var turn int
					return &runner{name: name, batch: 200, do: func() {
						turn++
						must(b, bm.do(p, turn) == nil)
					}}
				}
				of := timed("many", many)
				compareTimes(b, of, timed("few", few))
				r := benchtest.Times(bm.name, "µs", of.times)
				r.At = n
				benchtest.Put(b, "keys", r)
			})
		}
	}
}
