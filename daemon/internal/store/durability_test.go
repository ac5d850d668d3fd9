package store

import (
	"bufio"
	"context"
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

	"github.com/msbd/msbd/daemon/internal/token"
)

// durabilityDir tells the test binary that it is the process to be killed.
const durabilityDir = "MSBD_TEST_DURABILITY_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(durabilityDir); dir != "" {
		fmt.Fprintln(os.Stderr, issueForever(dir))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

func openKeys(dir string) (*Store, *token.Issuer, *token.Verifier, error) {
	s, err := Open(dir)
	if err != nil {
		return nil, nil, nil, err
	}
	i, v, err := token.Open(token.Options{
		KeyringPath: filepath.Join(dir, "keyring.json"), Store: s, Log: slog.New(slog.DiscardHandler),
	})
	return s, i, v, err
}

// issueForever makes keys, several at once, and prints each when it was acknowledged. Now and then it
// replaces the signing key, and says so before it begins and after it is done.
func issueForever(dir string) error {
	_, issuer, _, err := openKeys(dir)
	if err != nil {
		return err
	}
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
			for {
				gate.RLock()
				secret, _, err := issuer.Issue(context.Background(), token.IssueRequest{Expire: "1d", Namespace: "churn"})
				if err != nil {
					failed <- err
					return
				}
				say("issued", secret.Reveal())
				gate.RUnlock()
			}
		}()
	}
	go func() {
		for {
			<-time.After(time.Duration(rand.IntN(100)) * time.Millisecond)
			gate.Lock()
			say("resetting", "-")
			if _, err := issuer.Reset(context.Background()); err != nil {
				failed <- err
				return
			}
			say("reset", "-")
			gate.Unlock()
		}
	}()
	return <-failed
}

// Whatever was acknowledged before kill -9 holds after it: keys are good, keys from before a reset
// are not. A reset that was cut off may have happened or not.
func TestKillLosesNothing(t *testing.T) {
	rounds := 20
	if testing.Short() {
		rounds = 3
	}
	dir := t.TempDir() + "/state"
	good, dead := map[string]bool{}, map[string]bool{}
	var total int
	for round := range rounds {
		inDoubt := killedRun(t, dir, good, dead, time.Duration(1+rand.IntN(150))*time.Millisecond)
		s, _, v, err := openKeys(dir)
		if err != nil {
			t.Fatalf("round %d: the killed daemon's state does not open: %v", round, err)
		}
		var lost int
		for key := range good {
			if _, err := v.Verify(key); err != nil {
				lost++
			}
		}
		if lost > 0 && (!inDoubt || lost != len(good)) {
			t.Errorf("round %d: %d of %d acknowledged keys are refused", round, lost, len(good))
		}
		for key := range dead {
			if _, err := v.Verify(key); err == nil {
				t.Errorf("round %d: a key from before a reset is taken", round)
			}
		}
		total += len(good)
		if lost > 0 {
			for key := range good {
				dead[key] = true
			}
			clear(good)
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if total == 0 || len(dead) == 0 {
		t.Errorf("nothing was tried: %d keys, %d reset", total, len(dead))
	}
	t.Logf("%d rounds: %d keys checked, %d of them reset", rounds, total, len(dead))
}

// killedRun runs a process that issues keys, kills it some time after its first key, and sorts what it
// acknowledged into good and dead. It says whether a reset was under way.
func killedRun(t *testing.T, dir string, good, dead map[string]bool, after time.Duration) (resetInDoubt bool) {
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
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		if kill == nil {
			kill = time.AfterFunc(after, func() { _ = cmd.Process.Kill() })
		}
		word, key, ok := strings.Cut(lines.Text(), " ")
		switch {
		case word == "issued" && ok && len(key) > 100:
			good[key] = true
		case word == "resetting":
			resetInDoubt = true
		case word == "reset":
			resetInDoubt = false
			for key := range good {
				dead[key] = true
			}
			clear(good)
		}
	}
	if err := cmd.Wait(); kill == nil || err == nil || cmd.ProcessState.ExitCode() != -1 {
		t.Fatalf("the process ended by itself: %v\n%s", err, stderr.String())
	}
	return resetInDoubt
}
