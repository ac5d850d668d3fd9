//go:build !race

// The race detector leaves this file out. It would make each case many times slower, and finds nothing in tests where one
// goroutine opens a state directory, or traces or kills a child process.

package store_test

import (
	"bufio"
	"context"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/sys/randtest"
)

func init() { roles["churn"] = churn }

// churn creates keys concurrently and prints each once it was acknowledged. Now and then it revokes a key or replaces
// the signing key, and prints a line before it begins and another when it is done.
func churn(dir string) error {
	seed, err := strconv.ParseUint(os.Getenv(childSeed), 10, 64)
	if err != nil {
		return fmt.Errorf("%s: %w", childSeed, err)
	}
	random := rand.New(rand.NewPCG(seed, 0))
	srv, err := start(dir)
	if err != nil {
		return err
	}
	ctx := context.Background()
	var mu sync.Mutex
	report := func(word, key string) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Println(word, key)
	}
	failed := make(chan error)
	var gate sync.RWMutex // held for writing during a reset, so that the keys printed before it were issued before it
	for range 4 {
		go func() {
			for n := 0; ; n++ {
				gate.RLock()
				secret, r, err := srv.issuer.Issue(ctx, keys.IssueRequest{Expire: "1d", Namespaces: []string{"churn"}})
				if err != nil {
					failed <- err
					return
				}
				report("issued", secret.Reveal())
				if n%5 == 0 {
					report("revoking", secret.Reveal())
					if _, err := srv.issuer.Revoke(ctx, r.ID, 0); err != nil {
						failed <- err
						return
					}
					report("revoked", secret.Reveal())
				}
				gate.RUnlock()
			}
		}()
	}
	go func() {
		for {
			<-time.After(time.Duration(random.IntN(100)) * time.Millisecond)
			gate.Lock()
			report("resetting", "-")
			if _, err := srv.issuer.Reset(ctx, 0); err != nil {
				failed <- err
				return
			}
			report("reset", "-")
			gate.Unlock()
		}
	}()
	return <-failed
}

// What was acknowledged before a kill -9 is still true after it: issued keys are accepted, revoked keys and keys from
// before a reset are refused, and the audit log is intact. An interrupted reset or revocation may have happened or not.
func TestKillLosesNothing(t *testing.T) {
	t.Parallel()
	rounds := 50
	switch {
	case soak:
		rounds = 10_000
	case testing.Short():
		rounds = 3
	}
	random := randtest.New(t)
	dir := t.TempDir() + "/state"
	good, dead := map[string]bool{}, map[string]bool{}
	var total int
	for round := range rounds {
		resetInDoubt, inDoubt := killedRun(t, dir, good, dead, random)
		srv, err := start(dir)
		if err != nil {
			t.Fatalf("round %d: start on the state of the killed process: %v", round, err)
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
				t.Errorf("round %d: a key that was revoked or reset is accepted", round)
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
		t.Errorf("the test tried nothing: %d keys, %d dead", total, len(dead))
	}
	t.Logf("%d rounds: %d checks of live keys, %d dead keys", rounds, total, len(dead))
}

// killedRun runs a process that issues keys, kills it at a random time after its first key, and adds the keys that it
// acknowledged to good and dead. It returns whether a reset was in progress, and the keys whose revocation was in
// progress, which are in good.
func killedRun(t *testing.T, dir string, good, dead map[string]bool, random *rand.Rand) (resetInDoubt bool, inDoubt map[string]bool) {
	t.Helper()
	cmd := child("churn", dir)
	cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d", childSeed, random.Uint64()))
	after := time.Duration(1+random.IntN(150)) * time.Millisecond
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
			t.Logf("truncated line: %q", lines.Text())
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
