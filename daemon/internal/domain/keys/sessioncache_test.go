package keys

import (
	"context"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

// canceledByRefusal waits until ctx is canceled, and checks that the cause is that its key is refused.
func canceledByRefusal(t testing.TB, ctx context.Context) {
	t.Helper()
	<-ctx.Done()
	if cause := context.Cause(ctx); !errdefs.IsUnauthorized(cause) {
		t.Errorf("the context was canceled with the cause %v", cause)
	}
}

// When a key becomes invalid in any way, the contexts that are bound to it are canceled. A context that is bound
// later, by a request that was verified before, is canceled at once.
func TestBoundContextsEndWithTheirKey(t *testing.T) {
	tests := map[string]struct {
		req IssueRequest
		end func(t *testing.T, i *Issuer, r Record)
	}{
		"revoke": {end: func(t *testing.T, i *Issuer, r Record) { revoke(t, i, r.ID) }},
		"rotate": {end: func(t *testing.T, i *Issuer, r Record) {
			if _, _, _, err := i.Rotate(t.Context(), RotateRequest{Ref: r.ID}); err != nil {
				t.Error(err)
			}
		}},
		"end of a grace period": {end: func(t *testing.T, i *Issuer, r Record) {
			if _, _, _, err := i.Rotate(t.Context(), RotateRequest{Ref: r.ID, Grace: "1h"}); err != nil {
				t.Error(err)
			}
			time.Sleep(time.Hour)
		}},
		"end of a grace period before an expiry": {
			req: IssueRequest{Expire: "2h"},
			end: func(t *testing.T, i *Issuer, r Record) {
				if _, _, _, err := i.Rotate(t.Context(), RotateRequest{Ref: r.ID, Grace: "1h"}); err != nil {
					t.Error(err)
				}
				time.Sleep(time.Hour)
			},
		},
		"expiry": {
			req: IssueRequest{Expire: "3y"}, // longer than a timer is set
			end: func(t *testing.T, _ *Issuer, r Record) { time.Sleep(time.Until(r.ExpiresAt)) },
		},
		"reset": {end: func(t *testing.T, i *Issuer, _ Record) { reset(t, i) }},
		"restore of another signing key": {end: func(t *testing.T, i *Issuer, _ Record) {
			_, other, _ := newIssuer(t)
			restore(t, i, snapshot(t, other))
		}},
		"restore of a backup where it is revoked": {end: func(t *testing.T, i *Issuer, r Record) {
			b := snapshot(t, i)
			at := slices.IndexFunc(b.records, func(other Record) bool { return other.ID == r.ID })
			b.records[at].RevokedAt, b.records[at].Revocation = r.CreatedAt, ByHand
			restore(t, i, b)
		}},
		"prune": {
			req: IssueRequest{Expire: "1h"},
			end: func(t *testing.T, i *Issuer, r Record) {
				time.Sleep(time.Hour)
				if _, err := i.Prune(t.Context(), "", false, 0); err != nil {
					t.Error(err)
				}
			},
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				_, i, v := newIssuer(t)
				token, r := issue(t, i, tt.req)
				other, _ := issue(t, i, IssueRequest{})
				p, otherPrincipal := accepted(t, v, token), accepted(t, v, other)
				before, cancel := p.Bind(t.Context())
				defer cancel()
				finished, finish := p.Bind(t.Context())
				finish()
				if context.Cause(finished) != context.Canceled {
					t.Errorf("the cause of a context that its owner canceled is %v", context.Cause(finished))
				}
				if before.Err() != nil {
					t.Fatal("the context is canceled although the key is live")
				}
				tt.end(t, i, r)
				canceledByRefusal(t, before)
				after, cancel := p.Bind(t.Context())
				defer cancel()
				if after.Err() == nil {
					t.Error("a context that was bound after the key became invalid is not canceled")
				}
				canceledByRefusal(t, after)
				refused(t, v, token)
				if !strings.Contains(name, "restore of another") && name != "reset" {
					bound, cancel := otherPrincipal.Bind(t.Context())
					defer cancel()
					synctest.Wait()
					if bound.Err() != nil {
						t.Errorf("the context of another key was canceled as well: %v", context.Cause(bound))
					}
				}
			})
		})
	}
}

// A context that is bound to a Principal that Verify did not return, as in dev mode, is canceled only with its parent.
func TestBindWithoutSession(t *testing.T) {
	t.Parallel()
	parent, end := context.WithCancel(context.Background())
	ctx, cancel := Principal{KeyID: "dev"}.Bind(parent)
	defer cancel()
	if ctx.Err() != nil {
		t.Error("the context is canceled before its parent")
	}
	end()
	<-ctx.Done()
}

// A request that arrives during a revocation is either refused or canceled. None continues after Revoke has returned.
func TestNoRequestOutlivesARevocation(t *testing.T) {
	t.Parallel()
	_, i, v := newIssuer(t)
	for range iterations(t, 200, 20_000) {
		token, r := issue(t, i, IssueRequest{})
		var wg sync.WaitGroup
		start := make(chan struct{})
		for range 4 {
			wg.Go(func() {
				<-start
				for {
					p, err := v.Verify(token, from)
					if err != nil {
						return
					}
					ctx, cancel := p.Bind(context.Background())
					if ctx.Err() != nil {
						canceledByRefusal(t, ctx)
					}
					cancel()
				}
			})
		}
		p := accepted(t, v, token)
		bound, cancel := p.Bind(context.Background())
		close(start)
		revoke(t, i, r.ID)
		refused(t, v, token)
		late, cancelLate := p.Bind(context.Background())
		if late.Err() == nil {
			t.Error("a context that was bound after the revocation is not canceled")
		}
		canceledByRefusal(t, bound)
		wg.Wait()
		cancel()
		cancelLate()
	}
}

// A key in use accepts only the token that this server has issued. Other tokens get no session, so that they cannot fill
// the memory, and no signature check, except for the few that detect a stolen signing key.
func TestOneSessionPerKey(t *testing.T) {
	t.Parallel()
	_, i, v := newIssuer(t)
	token, _ := issue(t, i, IssueRequest{})
	accepted(t, v, token)
	checks := countChecks(v)
	began := time.Now()
	for n := range 10 * suspectChecksBurst {
		refused(t, v, forgeSignature(token, n))
	}
	most := suspectChecksBurst + int64(time.Since(began).Seconds()*suspectChecksPerSecond) + 1
	if n := checks.Load(); n > most {
		t.Errorf("%d signatures were checked, want at most %d", n, most)
	}
	if n := sessionCount(v); n != 1 {
		t.Errorf("%d sessions are open", n)
	}
	accepted(t, v, token)
	if events := i.suspects.take(); events != nil {
		t.Errorf("forgeries were reported: %+v", events)
	}
}
