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
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/msbd/msbd/daemon/internal/data/store"
	"github.com/msbd/msbd/daemon/internal/domain/keys"

	"github.com/msbd/msbd/daemon/internal/sys/randtest"
)

// If the environment variable durabilityDir is set, the test binary is the process to be killed. It works in the
// directory that the variable names, and takes the seed for its random numbers from the variable durabilitySeed.
const (
	durabilityDir  = "MSBD_TEST_DURABILITY_DIR"
	durabilitySeed = "MSBD_TEST_DURABILITY_SEED"
)

func TestMain(m *testing.M) {
	store.RunCheckIfChild()
	if dir := os.Getenv(durabilityDir); dir != "" {
		seed, err := strconv.ParseUint(os.Getenv(durabilitySeed), 10, 64)
		if err == nil {
			err = churnForever(dir, seed)
		}
		fmt.Fprintln(os.Stderr, err)
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

// ownKey is a key that a goroutine of churnForever created and no other goroutine uses.
type ownKey struct{ id, token string }

// churnForever creates, revokes and rotates keys in several goroutines, and replaces the signing key from time to
// time. It prints a line after each step, and also before each step that makes keys invalid:
//
//	good TOKEN           the key was created
//	ending TOKEN ID      the key is about to be revoked or rotated
//	dead TOKEN           the key was revoked
//	rotated TOKEN NEW    the key was rotated and replaced by the key with the token NEW
//	resetting            the signing key is about to be replaced
//	reset                the signing key was replaced: all keys printed before are invalid
func churnForever(dir string, seed uint64) error {
	_, issuer, verifier, err := openKeys(dir)
	if err != nil {
		return err
	}
	ctx := context.Background()
	var mu sync.Mutex
	report := func(words ...string) {
		mu.Lock()
		defer mu.Unlock()
		fmt.Println(strings.Join(words, " "))
	}
	failed := make(chan error)
	var resetMu sync.RWMutex // so that each step is entirely before or after each reset, with the line that reports it
	var resets int
	churn := func(rnd *rand.Rand, own *[]ownKey, seen *int) error {
		resetMu.RLock()
		defer resetMu.RUnlock()
		if *seen != resets {
			*own, *seen = nil, resets
		}
		step := rnd.IntN(4)
		if len(*own) == 0 {
			step = 0
		}
		if step < 2 {
			secret, r, err := issuer.Issue(ctx, keys.IssueRequest{Expire: "1d", Namespaces: []string{"churn", "other"}})
			if err != nil {
				return err
			}
			report("good", secret.Reveal())
			*own = append(*own, ownKey{r.ID, secret.Reveal()})
			return nil
		}
		n := rnd.IntN(len(*own))
		k := (*own)[n]
		if _, err := verifier.Verify(k.token, from); err != nil { // opens a session
			return err
		}
		report("ending", k.token, k.id)
		if step == 2 {
			if _, err := issuer.Revoke(ctx, k.id, 0); err != nil {
				return err
			}
			report("dead", k.token)
			*own = append((*own)[:n], (*own)[n+1:]...)
			return nil
		}
		secret, r, _, err := issuer.Rotate(ctx, keys.RotateRequest{Ref: k.id})
		if err != nil {
			return err
		}
		report("rotated", k.token, secret.Reveal())
		(*own)[n] = ownKey{r.ID, secret.Reveal()}
		return nil
	}
	for worker := range 4 {
		go func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(worker)))
			var own []ownKey
			var seen int
			for {
				if err := churn(rnd, &own, &seen); err != nil {
					failed <- err
					return
				}
			}
		}()
	}
	go func() {
		rnd := rand.New(rand.NewPCG(seed, 4))
		for {
			<-time.After(time.Duration(rnd.IntN(200)) * time.Millisecond)
			resetMu.Lock()
			report("resetting")
			if _, err := issuer.Reset(ctx, 0); err != nil {
				failed <- err
				return
			}
			report("reset")
			resets++
			resetMu.Unlock()
		}
	}()
	return <-failed
}

// acknowledged is what the killed processes have reported.
type acknowledged struct {
	good, dead map[string]bool // by token
	// ending holds the ids, by token, of the keys for which the last process reported only that their revocation or
	// rotation was about to begin.
	ending    map[string]string
	resetting bool
	changes   map[string]int // the number of lines, by their first word
}

// hasAllChanges reports whether each kind of change was reported at least once.
func (a *acknowledged) hasAllChanges() bool {
	for _, what := range []string{"good", "dead", "rotated", "reset"} {
		if a.changes[what] == 0 {
			return false
		}
	}
	return true
}

// add adds a line that a process has printed.
func (a *acknowledged) add(words []string) {
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
		a.markAllDead()
	}
}

// markAllDead moves all good keys to dead.
func (a *acknowledged) markAllDead() {
	for key := range a.good {
		a.dead[key] = true
	}
	clear(a.good)
}

// Changes that were acknowledged before kill -9 are in effect afterwards: created keys are accepted, and keys that were
// revoked, rotated or created before a reset are refused. A change that the kill interrupted happened completely or not
// at all. The last round ends only after each kind of change was reported at least once, so that all of them are
// tested. The seed decides the steps of the process and the delays, but not how many steps a delay has time for.
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
	rnd := randtest.New(t)
	var checked int
	for round := range rounds {
		lastRound := round == rounds-1
		runAndKill(t, dir, rnd, a, func() bool { return !lastRound || a.hasAllChanges() })
		s, i, v, err := openKeys(dir)
		if err != nil {
			t.Fatalf("round %d: open the state of the killed process: %v", round, err)
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
				t.Errorf("round %d: a key is accepted that was revoked, rotated or reset", round)
			}
		}
		for key, id := range a.ending {
			k, err := i.Find(id)
			if err != nil {
				t.Errorf("round %d: find a key that was being revoked or rotated: %v", round, err)
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
				t.Errorf("round %d: a rotation was only half done: %v", round, err)
			}
		}
		if lost > 0 {
			a.markAllDead()
		}
		if head, err := s.VerifyAudit(context.Background()); err != nil || head != s.AuditHead() {
			t.Errorf("round %d: the audit log is valid up to %+v, %v", round, head, err)
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
	t.Logf("%d rounds, %d keys checked; changes: %v", rounds, checked, a.changes)
}

// runAndKill runs a process that executes churnForever, and adds the lines that it prints to a. After the first line at
// which ready returns true, runAndKill waits for a random delay and kills the process.
func runAndKill(t *testing.T, dir string, rnd *rand.Rand, a *acknowledged, ready func() bool) {
	t.Helper()
	seed, delay := rnd.Uint64(), time.Duration(1+rnd.IntN(150))*time.Millisecond
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), durabilityDir+"="+dir, durabilitySeed+"="+strconv.FormatUint(seed, 10))
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
		if err != nil { // an incomplete line does not count
			break
		}
		a.add(strings.Fields(line))
		if kill == nil && ready() {
			kill = time.AfterFunc(delay, func() { _ = cmd.Process.Kill() })
		}
	}
	if err := cmd.Wait(); kill == nil || err == nil || cmd.ProcessState.ExitCode() != -1 {
		t.Fatalf("the process ended before it was killed: %v\n%s", err, stderr.String())
	}
}
