package keys

import (
	"context"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// run runs an issuer until the function that it returns is called.
func run(t testing.TB, i *Issuer) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- i.Run(ctx) }()
	return func() {
		t.Helper()
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
	}
}

func TestUsage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		store, path := NewMemory(), keyringPath(t)
		i, v := openIssuer(t, store, path)
		token, r := issue(t, i, IssueRequest{})
		_, idle := issue(t, i, IssueRequest{})
		stop := run(t, i)
		second := netip.MustParseAddr("2001:db8::1")
		use := func(from netip.Addr) {
			t.Helper()
			if _, err := v.Verify(token, from); err != nil {
				t.Error(err)
			}
		}
		saved := func() Usage {
			usage, _ := store.Used()
			return usage[r.ID]
		}
		use(from)
		use(from)
		time.Sleep(10 * time.Second)
		use(second)
		want := Usage{Requests: 3, LastUsedAt: time.Now().UTC().Truncate(time.Millisecond), LastUsedFrom: second}
		if k, err := i.Find(r.ID); err != nil || k.Usage != want {
			t.Errorf("its use is %+v, %v, want %+v", k.Usage, err, want)
		}
		if _, err := v.Verify(token[:len(token)-1], from); err == nil {
			t.Error("a bad token is taken")
		}
		synctest.Wait()
		if usage, _ := store.Used(); len(usage) != 0 {
			t.Error("a request waited for the store")
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		usage, latest := store.Used()
		if diff := cmp.Diff(map[string]Usage{r.ID: want}, usage, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Error(diff)
		}
		if late := time.Since(latest); late > time.Minute || late < 0 {
			t.Errorf("the latest time is off by %s", late)
		}

		// A store that fails is tried again, and what was counted meanwhile is not lost.
		store.FailWith(errDisk)
		use(netip.Addr{})
		time.Sleep(3 * time.Minute)
		store.FailWith(nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		if u := saved(); u.Requests != 4 || u.LastUsedFrom.IsValid() {
			t.Errorf("after the store failed: %+v", u)
		}
		// Only what changed is written.
		if err := store.SaveUsage(map[string]Usage{r.ID: {}}, time.Time{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if u := saved(); u != (Usage{}) {
			t.Errorf("unused, it was written: %+v", u)
		}
		use(from)
		stop() // and the end saves
		if u := saved(); u.Requests != 5 || u.LastUsedFrom != from {
			t.Errorf("at the end: %+v", u)
		}

		again, v := openIssuer(t, store, path)
		if _, err := v.Verify(token, from); err != nil {
			t.Error(err)
		}
		if k, err := again.Find(r.ID); err != nil || k.Requests != 6 {
			t.Errorf("after a restart: %+v, %v", k.Usage, err)
		}
		if k, err := again.Find(idle.ID); err != nil || k.Usage != (Usage{}) {
			t.Errorf("the idle key: %+v, %v", k.Usage, err)
		}
	})
}

// Were the time saved beside a reset, which sets it back, it might be the old one that stays. No other
// change waits for it: a revocation above all does not.
func TestUsageIsNotSavedBesideAReset(t *testing.T) {
	t.Parallel()
	store, i, _ := newIssuer(t)
	_, r := issue(t, i, IssueRequest{})
	var saves, resets int
	store.FailIf(func(c Change) error {
		saved := len(c.Events) == 0 && c.Clock.IsZero()
		switch {
		case saved:
			saves++
			revoke(t, i, r.ID)
		case c.Clock.IsZero():
			return nil // the revocation, and the reset's first change
		default:
			resets++
		}
		if i.saving.TryLock() {
			i.saving.Unlock()
			t.Errorf("another one could have begun (of usage: %t)", saved)
		}
		return nil
	})
	i.saveUsage()
	reset(t, i)
	if saves != 1 || resets != 1 {
		t.Errorf("usage was saved %d times, the time set back %d times", saves, resets)
	}
}

// Nor does it touch what other changes do: that is for the race detector.
func TestUsageIsSavedBesideOtherChanges(t *testing.T) {
	t.Parallel()
	_, i, v := newIssuer(t)
	var tokens []string
	for range 20 {
		token, _ := issue(t, i, IssueRequest{})
		tokens = append(tokens, token)
	}
	b := snapshot(t, i)
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 200 {
			for _, token := range tokens {
				accepted(t, v, token)
			}
			i.saveUsage()
		}
	})
	for range 200 {
		if _, _, err := i.Restore(context.Background(), b.keyring, b.records, 0); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
	if k, err := i.Find(b.records[0].ID); err != nil || k.Requests != 200 {
		t.Errorf("%d requests were counted, %v", k.Requests, err)
	}
}

func TestLastUsedFrom(t *testing.T) {
	t.Parallel()
	var u usage
	for _, text := range []string{"255.255.255.255", "::", "::ffff:1.2.3.4", "1.2.3.4", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"} {
		a := netip.MustParseAddr(text)
		if u.count(1, a); u.load().LastUsedFrom != a {
			t.Errorf("%s became %s", a, u.load().LastUsedFrom)
		}
	}
	if u.count(1, netip.Addr{}); u.load().LastUsedFrom.IsValid() {
		t.Errorf("no address became %s", u.load().LastUsedFrom)
	}
	if u.count(1, netip.MustParseAddr("fe80::1%eth0")); u.load().LastUsedFrom != netip.MustParseAddr("fe80::1") {
		t.Errorf("with a zone: %s", u.load().LastUsedFrom)
	}
}

func TestUsageCountsEveryRequest(t *testing.T) {
	t.Parallel()
	_, i, v := newIssuer(t)
	token, r := issue(t, i, IssueRequest{})
	const clients, requests = 8, 2000
	var wg sync.WaitGroup
	for n := range clients {
		wg.Go(func() {
			for range requests {
				if _, err := v.Verify(token, netip.AddrFrom4([4]byte{192, 0, 2, byte(n)})); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if k, err := i.Find(r.ID); err != nil || k.Requests != clients*requests {
		t.Errorf("%d requests were counted, %v", k.Requests, err)
	}
}
