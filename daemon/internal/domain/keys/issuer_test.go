package keys

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/api/audit"
)

func TestIssueAndVerify(t *testing.T) {
	t.Parallel()
	store, i, v := newIssuer(t)
	key, r := issue(t, i, IssueRequest{
		Name: "ci.build_1", Expire: "1w", Namespaces: []string{"project-web", "a", "project-web"},
		Scopes: []Scope{ScopeStop, ScopeExec, ScopeStop}, CreatedBy: 1000,
	})
	if !strings.HasPrefix(key, "msb_v2.public.") || len(key) > maxLength {
		t.Errorf("the key is %q", key)
	}
	want := Record{
		ID: r.ID, Name: "ci.build_1", Namespaces: []string{"a", "project-web"}, Scopes: []Scope{ScopeExec, ScopeStop},
		CreatedAt: r.CreatedAt, CreatedBy: 1000, Life: "1w", ExpiresAt: r.CreatedAt.Add(7 * 24 * time.Hour), SigningKeyID: i.SigningKey().ID,
	}
	if diff := cmp.Diff(want, r); diff != "" || !isID(r.ID) || time.Since(r.CreatedAt) > time.Minute {
		t.Errorf("the record is %+v\n%s", r, diff)
	}
	if diff := cmp.Diff(want, store.Records()[r.ID]); diff != "" {
		t.Errorf("the store has another record:\n%s", diff)
	}
	for range 2 { // the second time, the key has a session
		p := accepted(t, v, key)
		if p.KeyID != r.ID || !p.Allows("project-web") || !p.Allows("a") || p.Allows("default") || p.Allows("") {
			t.Errorf("the principal is %+v", p)
		}
		if !p.Has(ScopeExec) || !p.Has(ScopeStop) || p.Has(ScopeStart) || p.Has("") {
			t.Errorf("the scopes are %v", p.Scopes)
		}
	}
	all, global := issue(t, i, IssueRequest{})
	asked := []string{"b", "a", "b"}
	issue(t, i, IssueRequest{Namespaces: asked})
	if !slices.Equal(asked, []string{"b", "a", "b"}) {
		t.Errorf("Issue changed the caller's namespaces to %q", asked)
	}
	if p := accepted(t, v, all); !p.Allows("default") || !p.Allows("a") || !p.Has(ScopeMetrics) {
		t.Errorf("the principal of a key without limits is %+v", p)
	}
	if zero := (Principal{}); zero.Allows("default") || zero.Has(ScopeRead) {
		t.Error("the zero Principal has permissions")
	}
	if c := i.Counts(); c != (Counts{Live: 3}) {
		t.Errorf("counts are %+v", c)
	}
	wantEvents := []audit.Event{
		{Action: audit.KeyCreate, Actor: "uid:1000", Target: r.ID, Detail: map[string]string{
			"name": "ci.build_1", "namespaces": "a,project-web", "scopes": "sandbox:exec,sandbox:stop", "expires": r.ExpiresAt.Format(time.RFC3339),
		}},
		{Action: audit.KeyCreate, Actor: "uid:0", Target: global.ID, Detail: map[string]string{
			"namespaces": "*", "scopes": "*", "expires": "never",
		}},
	}
	if diff := cmp.Diff(wantEvents, store.TakeEvents()[:2]); diff != "" {
		t.Error(diff)
	}
}

func TestIssueRefuses(t *testing.T) {
	t.Parallel()
	store, i, _ := newIssuer(t)
	many := make([]string, 40)
	for n := range many {
		many[n] = fmt.Sprintf("%s%d", strings.Repeat("n", 50), n)
	}
	for want, req := range map[string]IssueRequest{
		"has no unit":                 {Expire: "1"},
		`namespace "*"`:               {Namespaces: []string{"a", "*"}},
		`namespace "a/b"`:             {Namespaces: []string{"a/b"}},
		`namespace ""`:                {Namespaces: []string{""}},
		`key name "-a"`:               {Name: "-a"},
		`key name ".a"`:               {Name: ".a"},
		`key name "a b"`:              {Name: "a b"},
		`key name "a\n"`:              {Name: "a\n"},
		`key name "é"`:                {Name: "é"},
		"key name":                    {Name: strings.Repeat("a", 64)},
		`unknown scope "sandbox:fly"`: {Scopes: []Scope{ScopeExec, "sandbox:fly"}},
		"choose from sandbox:start, sandbox:stop, sandbox:exec, sandbox:files, sandbox:read, server:metrics": {Scopes: []Scope{""}},
		"name fewer namespaces":   {Namespaces: many},
		"covers the whole server": {Scopes: []Scope{ScopeRead, ScopeMetrics}, Namespaces: []string{"a"}},
	} {
		secret, r, err := i.Issue(context.Background(), req)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), want) {
			t.Errorf("Issue(%+v): %v, want %q", req, err, want)
		}
		if secret.Reveal() != "" || r.ID != "" {
			t.Errorf("Issue(%+v) returned a key together with an error", req)
		}
	}
	store.FailWith(errDisk)
	if secret, _, err := i.Issue(context.Background(), IssueRequest{Name: "a"}); !errors.Is(err, errDisk) || secret.Reveal() != "" {
		t.Errorf("Issue with a failing store: %v", err)
	}
	store.FailWith(nil)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, _, err := i.Issue(ctx, IssueRequest{}); !errors.Is(err, context.Canceled) {
		t.Errorf("Issue with a canceled context: %v", err)
	}
	if c := i.Counts(); c != (Counts{}) || len(store.Records()) != 0 || len(store.Events()) != 0 {
		t.Errorf("after the failures, the counts are %+v, the records %v, the events %v", c, store.Records(), store.Events())
	}
	issue(t, i, IssueRequest{Name: "a"}) // the name is free after the failure
}

// The server never issues a key that is too long for it to accept. To test this, issue keys with more and more
// namespaces, until Issue refuses to.
func TestLongestTokenIsAccepted(t *testing.T) {
	t.Parallel()
	_, i, v := newIssuer(t)
	var namespaces []string
	for n := 0; ; n++ {
		namespaces = append(namespaces, fmt.Sprintf("namespace-%02d", n))
		secret, _, err := i.Issue(context.Background(), IssueRequest{Namespaces: namespaces})
		if err != nil {
			if n < 50 {
				t.Errorf("with only %d namespaces: %v", n, err)
			}
			return
		}
		accepted(t, v, secret.Reveal())
	}
}

func TestNamesAreUnique(t *testing.T) {
	t.Parallel()
	clock := newManualClock("2026-01-10T10:00:00Z")
	opts := options(NewMemory(), keyringPath(t))
	opts.readClock, opts.asleep = clock.read, clock.slept
	i, _ := openWith(t, opts)
	taken := func(name string) {
		t.Helper()
		if _, _, err := i.Issue(context.Background(), IssueRequest{Name: name}); !errdefs.IsAlreadyExists(err) || !strings.Contains(err.Error(), "choose another") {
			t.Errorf("a second key %q: %v", name, err)
		}
	}
	_, a := issue(t, i, IssueRequest{Name: "a", Expire: "1h"})
	issue(t, i, IssueRequest{Name: "A"}) // names are case-sensitive
	taken("a")
	clock.pass(time.Hour)
	_, a = issue(t, i, IssueRequest{Name: "a"}) // the first key has expired
	taken("a")
	revoke(t, i, a.ID)
	_, a = issue(t, i, IssueRequest{Name: "a"})
	taken("a")
	if _, made, _, err := i.Rotate(context.Background(), RotateRequest{Ref: a.ID, Grace: "1h"}); err != nil || made.Name != "a" {
		t.Errorf("rotated into %+v, %v", made, err)
	} else {
		taken("a") // by the new key
		revoke(t, i, made.ID)
	}
	issue(t, i, IssueRequest{Name: "a"}) // the old key is still live but was rotated, so it does not hold the name
	taken("a")
	reset(t, i)
	issue(t, i, IssueRequest{Name: "a"})
}

// If several concurrent calls of Issue request the same name, one gets it. The others do not wait for the store. Calls
// with no name are in the store at the same time, so that they can share a commit.
func TestConcurrentIssue(t *testing.T) {
	t.Parallel()
	store, i, v := newIssuer(t)
	const named, unnamed = 20, 50
	arrived := make(chan struct{}, named+unnamed)
	proceed := make(chan struct{})
	store.FailIf(func(Change) error {
		arrived <- struct{}{}
		<-proceed
		return nil
	})
	var wg sync.WaitGroup
	results := make(chan error, named)
	for range named {
		wg.Go(func() {
			_, _, err := i.Issue(context.Background(), IssueRequest{Name: "ci"})
			results <- err
		})
	}
	for range unnamed {
		wg.Go(func() {
			secret, _, err := i.Issue(context.Background(), IssueRequest{})
			if err != nil {
				t.Error(err)
				return
			}
			accepted(t, v, secret.Reveal())
		})
	}
	for range unnamed + 1 {
		<-arrived // now all of these calls are in the store, and none has finished
	}
	close(proceed)
	wg.Wait()
	close(results)
	var won int
	for err := range results {
		switch {
		case err == nil:
			won++
		case !errdefs.IsAlreadyExists(err):
			t.Error(err)
		}
	}
	if c := i.Counts(); won != 1 || c.Live != unnamed+1 {
		t.Errorf("%d keys got the name; counts are %+v", won, c)
	}
}
