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

// run calls i.Run in a goroutine. stop ends it and waits until it has returned.
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
			t.Errorf("the usage is %+v, %v, want %+v", k.Usage, err, want)
		}
		if _, err := v.Verify(token[:len(token)-1], from); err == nil {
			t.Error("a truncated token is accepted")
		}
		synctest.Wait()
		if usage, _ := store.Used(); len(usage) != 0 {
			t.Error("usage was saved before the interval was over")
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		usage, latest := store.Used()
		if diff := cmp.Diff(map[string]Usage{r.ID: want}, usage, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Error(diff)
		}
		if late := time.Since(latest); late > time.Minute || late < 0 {
			t.Errorf("the saved latest time is %s old", late)
		}

		// If saving fails, it is tried again, and no request is lost.
		store.FailWith(errDisk)
		use(netip.Addr{})
		time.Sleep(3 * time.Minute)
		store.FailWith(nil)
		time.Sleep(time.Minute)
		synctest.Wait()
		if u := saved(); u.Requests != 4 || u.LastUsedFrom.IsValid() {
			t.Errorf("after the store failed: %+v", u)
		}
		// Only the usage of keys that were used since the last save is written.
		if err := store.SaveUsage(map[string]Usage{r.ID: {}}, time.Time{}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if u := saved(); u != (Usage{}) {
			t.Errorf("the usage of a key that was not used was written: %+v", u)
		}
		use(from)
		stop() // saves the usage
		if u := saved(); u.Requests != 5 || u.LastUsedFrom != from {
			t.Errorf("after Run has returned: %+v", u)
		}

		again, v := openIssuer(t, store, path)
		if _, err := v.Verify(token, from); err != nil {
			t.Error(err)
		}
		if k, err := again.Find(r.ID); err != nil || k.Requests != 6 {
			t.Errorf("after a restart: %+v, %v", k.Usage, err)
		}
		if k, err := again.Find(idle.ID); err != nil || k.Usage != (Usage{}) {
			t.Errorf("the unused key: %+v, %v", k.Usage, err)
		}
	})
}

// Usage is not saved during a reset: the reset sets the latest time back, and a concurrent save could overwrite that
// with the old time. Other changes, in particular revocations, do not wait while usage is saved.
func TestUsageIsNotSavedDuringReset(t *testing.T) {
	t.Parallel()
	store, i, _ := newIssuer(t)
	_, r := issue(t, i, IssueRequest{})
	var saves, resets int
	store.FailIf(func(c Change) error {
		isSave := len(c.Events) == 0 && c.Clock.IsZero()
		switch {
		case isSave:
			saves++
			revoke(t, i, r.ID)
		case c.Clock.IsZero() || len(c.Put) > 0:
			return nil // the first change of the reset, or the revocation
		default:
			resets++
		}
		if i.saving.TryLock() {
			i.saving.Unlock()
			t.Errorf("i.saving is not held (while usage is saved: %t)", isSave)
		}
		return nil
	})
	i.saveUsage()
	reset(t, i)
	if saves != 1 || resets != 1 {
		t.Errorf("usage was saved %d times, the time set back %d times", saves, resets)
	}
}

// Usage can be saved during other changes. This test is mainly for the race detector.
func TestUsageIsSavedDuringOtherChanges(t *testing.T) {
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
			t.Errorf("%s was recorded as %s", a, u.load().LastUsedFrom)
		}
	}
	if u.count(1, netip.Addr{}); u.load().LastUsedFrom.IsValid() {
		t.Errorf("the zero Addr was recorded as %s", u.load().LastUsedFrom)
	}
	if u.count(1, netip.MustParseAddr("fe80::1%eth0")); u.load().LastUsedFrom != netip.MustParseAddr("fe80::1") {
		t.Errorf("fe80::1%%eth0 was recorded as %s", u.load().LastUsedFrom)
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
