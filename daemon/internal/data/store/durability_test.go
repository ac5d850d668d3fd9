package store_test

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// churn makes keys, several at once, and prints each when it was acknowledged. Now and then it revokes
// one, or replaces the signing key, and says so before it begins and after it is done.
func churn(dir string) error {
	srv, err := start(dir)
	if err != nil {
		return err
	}
	ctx := context.Background()
	var mu sync.Mutex
	say := func(word, key string) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Println(word, key)
	}
	failed := make(chan error)
	var gate sync.RWMutex // so that what was printed before a reset was issued before it
	for range 4 {
		go func() {
			for n := 0; ; n++ {
				gate.RLock()
				secret, r, err := srv.issuer.Issue(ctx, keys.IssueRequest{Expire: "1d", Namespaces: []string{"churn"}})
				if err != nil {
					failed <- err
					return
				}
				say("issued", secret.Reveal())
				if n%5 == 0 {
					say("revoking", secret.Reveal())
					if _, err := srv.issuer.Revoke(ctx, r.ID, 0); err != nil {
						failed <- err
						return
					}
					say("revoked", secret.Reveal())
				}
				gate.RUnlock()
			}
		}()
	}
	go func() {
		for {
			<-time.After(time.Duration(rand.IntN(100)) * time.Millisecond)
			gate.Lock()
			say("resetting", "-")
			if _, err := srv.issuer.Reset(ctx, 0); err != nil {
				failed <- err
				return
			}
			say("reset", "-")
			gate.Unlock()
		}
	}()
	return <-failed
}

// Whatever was acknowledged before kill -9 holds after it: keys are good, revoked keys and those from
// before a reset are not, and the audit log is whole. A reset or a revocation that was cut off may have
// happened or not.
func TestKillLosesNothing(t *testing.T) {
	t.Parallel()
	rounds := max(3, 50/oneOf())
	switch {
	case soak:
		rounds = 10_000
	case testing.Short():
		rounds = 3
	}
	dir := t.TempDir() + "/state"
	good, dead := map[string]bool{}, map[string]bool{}
	var total int
	for round := range rounds {
		resetInDoubt, inDoubt := killedRun(t, dir, good, dead, time.Duration(1+rand.IntN(150))*time.Millisecond)
		srv, err := start(dir)
		if err != nil {
			t.Fatalf("round %d: the killed daemon's state does not open: %v", round, err)
		}
		accepted := func(key string) bool { _, err := srv.verifier.Verify(key, netip.Addr{}); return err == nil }
		var lost int
		for key := range good {
			if !accepted(key) && !inDoubt[key] {
				lost++
			}
		}
		if lost > 0 && (!resetInDoubt || lost != len(good)) {
			t.Errorf("round %d: %d of %d acknowledged keys are refused", round, lost, len(good))
		}
		for key := range dead {
			if accepted(key) {
				t.Errorf("round %d: a key that was revoked or reset is taken", round)
			}
		}
		total += len(good)
		for key := range good {
			if !accepted(key) {
				dead[key] = true
				delete(good, key)
			}
		}
		if err := checkAudit(srv, srv.AuditHead()); err != nil {
			t.Errorf("round %d: %v", round, err)
		}
		if err := srv.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if total == 0 || len(dead) == 0 {
		t.Errorf("nothing was tried: %d keys, %d dead", total, len(dead))
	}
	t.Logf("%d rounds: %d keys checked, %d of them dead", rounds, total, len(dead))
}

// killedRun runs a process that issues keys, kills it some time after its first key, and sorts what it
// acknowledged into good and dead. It returns what was under way: a reset, and the keys that were being
// revoked, which are in good.
func killedRun(t *testing.T, dir string, good, dead map[string]bool, after time.Duration) (resetInDoubt bool, inDoubt map[string]bool) {
	t.Helper()
	cmd := child("churn", dir)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	inDoubt = map[string]bool{}
	var kill *time.Timer
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if kill == nil {
			kill = time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		}
		word, key, ok := strings.Cut(lines.Text(), " ")
		switch {
		case !ok || word != "reset" && word != "resetting" && len(key) < 100:
			t.Logf("cut off: %q", lines.Text())
		case word == "issued":
			good[key] = true
		case word == "revoking":
			inDoubt[key] = true
		case word == "revoked":
			delete(good, key)
			delete(inDoubt, key)
			dead[key] = true
		case word == "resetting":
			resetInDoubt = true
		case word == "reset":
			resetInDoubt = false
			for key := range good {
				dead[key] = true
			}
			clear(good)
			clear(inDoubt)
		}
	}
	if err := cmd.Wait(); kill == nil || err == nil || cmd.ProcessState.ExitCode() != -1 {
		t.Fatalf("the process ended by itself: %v\n%s", err, stderr.String())
	}
	return resetInDoubt, inDoubt
}
