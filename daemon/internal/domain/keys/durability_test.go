package keys_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
)

// durabilityDir tells the test binary that it is the process to be killed.
const durabilityDir = "MSBD_TEST_DURABILITY_DIR"

func TestMain(m *testing.M) {
	store.MaybeCheckChild()
	if dir := os.Getenv(durabilityDir); dir != "" {
		fmt.Fprintln(os.Stderr, churnForever(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func openKeys(dir string) (*store.Store, *keys.Issuer, *keys.Verifier, error) {
	s, err := store.Open(dir)
	if err != nil {
		return nil, nil, nil, err
	}
	i, v, err := keys.Open(keys.Options{
		KeyringPath: filepath.Join(dir, "keyring.json"), Store: s, Log: slog.New(slog.DiscardHandler),
	})
	if err != nil {
		err = errors.Join(err, s.Close())
	}
	return s, i, v, err
}

// ownKey is a key that a churning goroutine made, of which others know nothing.
type ownKey struct{ id, token string }

// churnForever makes keys, revokes and rotates them, several at once, and now and then replaces the signing
// key. It prints a line before each step that ends keys and after each step:
//
//	good TOKEN           it was made
//	ending TOKEN ID      its revocation or rotation begins
//	dead TOKEN           it was revoked
//	rotated TOKEN NEW    it was rotated; NEW was made
//	resetting, reset     all that were printed before
func churnForever(dir string) error {
	_, issuer, verifier, err := openKeys(dir)
	if err != nil {
		return err
	}
	ctx := context.Background()
	var mu sync.Mutex
	say := func(words ...string) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Println(strings.Join(words, " "))
	}
	failed := make(chan error)
	var gate sync.RWMutex // so that what was printed before a reset was done before it
	var resets int
	churn := func(own *[]ownKey, seen *int) error {
		gate.RLock()
		defer gate.RUnlock()
		if *seen != resets {
			*own, *seen = nil, resets
		}
		step := rand.IntN(4)
		if len(*own) == 0 {
			step = 0
		}
		if step < 2 {
			secret, r, err := issuer.Issue(ctx, keys.IssueRequest{Expire: "1d", Namespaces: []string{"churn", "other"}})
			if err != nil {
				return err
			}
			say("good", secret.Reveal())
			*own = append(*own, ownKey{r.ID, secret.Reveal()})
			return nil
		}
		n := rand.IntN(len(*own))
		k := (*own)[n]
		if _, err := verifier.Verify(k.token, from); err != nil { // so that it has a session
			return err
		}
		say("ending", k.token, k.id)
		if step == 2 {
			if _, err := issuer.Revoke(ctx, k.id, 0); err != nil {
				return err
			}
			say("dead", k.token)
			*own = append((*own)[:n], (*own)[n+1:]...)
			return nil
		}
		secret, r, _, err := issuer.Rotate(ctx, keys.RotateRequest{Ref: k.id})
		if err != nil {
			return err
		}
		say("rotated", k.token, secret.Reveal())
		(*own)[n] = ownKey{r.ID, secret.Reveal()}
		return nil
	}
	for range 4 {
		go func() {
			var own []ownKey
			var seen int
			for {
				if err := churn(&own, &seen); err != nil {
					failed <- err
					return
				}
			}
		}()
	}
	go func() {
		for {
			<-time.After(time.Duration(rand.IntN(200)) * time.Millisecond)
			gate.Lock()
			say("resetting")
			if _, err := issuer.Reset(ctx, 0); err != nil {
				failed <- err
				return
			}
			say("reset")
			resets++
			gate.Unlock()
		}
	}()
	return <-failed
}

// acknowledged is what the killed processes said.
type acknowledged struct {
	good, dead map[string]bool
	// ending holds the ids of keys by token, of which the last process did not say how it ended.
	ending    map[string]string
	resetting bool
	changes   map[string]int
}

// all reports whether there was each kind of change.
func (a *acknowledged) all() bool {
	for _, what := range []string{"good", "dead", "rotated", "reset"} {
		if a.changes[what] == 0 {
			return false
		}
	}
	return true
}

func (a *acknowledged) line(words []string) {
	a.changes[words[0]]++
	switch words[0] {
	case "good":
		a.good[words[1]] = true
	case "ending":
		delete(a.good, words[1])
		a.ending[words[1]] = words[2]
	case "dead":
		delete(a.ending, words[1])
		a.dead[words[1]] = true
	case "rotated":
		delete(a.ending, words[1])
		a.dead[words[1]] = true
		a.good[words[2]] = true
	case "resetting":
		a.resetting = true
	case "reset":
		a.resetting = false
		a.bury()
	}
}

func (a *acknowledged) bury() {
	for key := range a.good {
		a.dead[key] = true
	}
	clear(a.good)
}

// R1: whatever was acknowledged before kill -9 holds after it: keys are good; keys that were revoked,
// rotated or made before a reset are not. What was cut off happened wholly or not at all. Of the last round
// it is sure, not only likely, that it is cut off after there was each kind of change.
func TestKillLosesNothing(t *testing.T) {
	rounds := 20
	switch {
	case os.Getenv("MSB_SOAK") == "1":
		rounds = 10_000
	case testing.Short():
		rounds = 3
	}
	dir := filepath.Join(t.TempDir(), "state")
	a := &acknowledged{good: map[string]bool{}, dead: map[string]bool{}, ending: map[string]string{}, changes: map[string]int{}}
	var checked int
	for round := range rounds {
		lastRound := round == rounds-1
		killedRun(t, dir, a, time.Duration(1+rand.IntN(150))*time.Millisecond, func() bool { return !lastRound || a.all() })
		s, i, v, err := openKeys(dir)
		if err != nil {
			t.Fatalf("round %d: the killed process's state does not open: %v", round, err)
		}
		accepts := func(key string) bool {
			_, err := v.Verify(key, from)
			return err == nil
		}
		var lost int
		for key := range a.good {
			if !accepts(key) {
				lost++
			}
		}
		if lost > 0 && (!a.resetting || lost != len(a.good)) {
			t.Errorf("round %d: %d of %d acknowledged keys are refused", round, lost, len(a.good))
		}
		for key := range a.dead {
			if accepts(key) {
				t.Errorf("round %d: a key is taken that was revoked, rotated or reset", round)
			}
		}
		for key, id := range a.ending {
			k, err := i.Find(id)
			if err != nil {
				t.Errorf("round %d: a key that was being ended: %v", round, err)
				continue
			}
			if accepts(key) {
				a.good[key] = true
				continue
			}
			a.dead[key] = true
			if k.ReplacedBy == "" {
				continue
			}
			if _, err := i.Find(k.ReplacedBy); err != nil {
				t.Errorf("round %d: half a rotation: %v", round, err)
			}
		}
		if lost > 0 {
			a.bury()
		}
		if head, err := s.VerifyAudit(context.Background()); err != nil || head != s.AuditHead() {
			t.Errorf("round %d: the audit log is good up to %+v, %v", round, head, err)
		}
		checked += len(a.good) + len(a.dead)
		clear(a.ending)
		a.resetting = false
		if round%50 == 49 {
			if _, err := i.Prune(context.Background(), "", false, 0); err != nil {
				t.Errorf("round %d: %v", round, err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%d rounds, %d checks of keys; changes: %v", rounds, checked, a.changes)
}

// killedRun runs a process that churns keys and kills it some time after its first line for which enough is true.
func killedRun(t *testing.T, dir string, a *acknowledged, after time.Duration, enough func() bool) {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), durabilityDir+"="+dir)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var kill *time.Timer
	for lines := bufio.NewReader(out); ; {
		line, err := lines.ReadString('\n')
		if err != nil { // what it did not finish it did not say
			break
		}
		a.line(strings.Fields(line))
		if kill == nil && enough() {
			kill = time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		}
	}
	if err := cmd.Wait(); kill == nil || err == nil || cmd.ProcessState.ExitCode() != -1 {
		t.Fatalf("the process ended by itself: %v\n%s", err, stderr.String())
	}
}
