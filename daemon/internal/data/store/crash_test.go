//go:build !race

// The race detector leaves this file out. It would make each case many times slower, and finds nothing in tests where one
// goroutine opens a state directory, or traces or kills a child process.

package store_test

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/msbd/msbd/api/audit"
)

// After a power loss at any moment, the store opens without help. It has the state before or after the change that was
// in progress, with everything that was acknowledged, and the audit log agrees with it. The moments are after every
// system call that writes, syncs, renames or removes. Of the data that was not synced by then, all, nothing or parts may
// be on the disk.
func TestPowerLoss(t *testing.T) {
	t.Parallel()
	t.Run("from the first start", func(t *testing.T) {
		t.Parallel()
		powerLoss(t, nil, nil, 1000, 1)
	})
	t.Run("from schema 1", func(t *testing.T) {
		t.Parallel()
		files, tokens := schema1(t)
		powerLoss(t, files, tokens, 2, 4)
	})
}

// crash is a power loss after a system call.
type crash struct {
	after string
	image map[string][]byte
	steps int // how many steps were complete
	// faulty is set if strace made an earlier call fail.
	faulty bool
}

// After a failed sync, a later sync that succeeds does not make the earlier data durable either: the store must write
// that data again.
func TestPowerLossAfterAFailedSync(t *testing.T) {
	t.Parallel()
	dir := filepath.Join(t.TempDir(), "state")
	_, calls := trace(t, historyOf(dir))
	syncs, step, log := 0, 0, 0
	for _, c := range calls {
		step += c.lines()
		if c.name != "fdatasync" {
			continue
		}
		syncs++
		file, _ := c.file(dir)
		if file == "audit.jsonl" {
			log++
		}
		if file == "audit.jsonl" || step == 2 || step == 7 { // two of many similar commits
			steps, fault := step+4, fmt.Sprintf("inject=fdatasync:error=EIO:when=%d", syncs)
			t.Run(fmt.Sprintf("%d, of %s", syncs, file), func(t *testing.T) {
				t.Parallel()
				powerLoss(t, nil, nil, steps, 1, "-e", fault)
			})
		}
	}
	if log == 0 {
		t.Error("the audit log was never synced")
	}
}

// powerLoss runs the first steps of history on a server that starts with files, and tries a power loss after each of its
// system calls. torn is the number of images with random parts of the unsynced data per call; in a soak it is four times as
// many. If options make strace let a call fail, only power losses after that call are tried.
func powerLoss(t *testing.T, files map[string][]byte, tokens map[string]string, first, torn int, options ...string) {
	if soak {
		torn *= 4
	}
	dir := filepath.Join(t.TempDir(), "state")
	if files != nil {
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		writeFiles(t, dir, files)
	}
	issued := slices.Sorted(maps.Values(tokens))
	cmd := child("history", dir)
	cmd.Env = append(cmd.Env, historyIssued+"="+strings.Join(issued, " "), historySteps+"="+strconv.Itoa(first), historyRestart+"=1")
	stdout, calls := trace(t, cmd, options...)
	steps := parseSteps(t, stdout)
	for _, s := range steps {
		if s.Err != "" && options == nil {
			t.Fatalf("%s: %s", s.Did, s.Err)
		}
	}
	crashes := crashesOf(t, dir, files, calls, torn)
	if options != nil {
		crashes = slices.DeleteFunc(crashes, func(c crash) bool { return !c.faulty })
	}
	if done := crashes[len(crashes)-1].steps; done != len(steps) || len(crashes) < 20 {
		t.Fatalf("found %d moments, the last after %d of %d steps; want at least 20 and all steps", len(crashes), done, len(steps))
	}

	// states[n] is the state after n steps. The first one is the state before the first start.
	states := []state{{Issued: issued, Accepted: steps[0].State.Accepted}}
	for _, s := range steps {
		states = append(states, s.State)
	}
	all := states[len(states)-1].Issued
	root := t.TempDir()
	var wg sync.WaitGroup
	running := make(chan struct{}, runtime.GOMAXPROCS(0))
	for n, c := range crashes {
		running <- struct{}{}
		wg.Go(func() {
			defer func() { <-running }()
			dir := filepath.Join(root, fmt.Sprint(n))
			if err := checkRecovery(t, dir, c, possibleStates(c, steps, states), all); err != nil {
				t.Errorf("power loss after %s, during step %q: %v", c.after, steps[min(c.steps, len(steps)-1)].Did, err)
				return
			}
			_ = os.RemoveAll(dir)
		})
	}
	wg.Wait()
	t.Logf("%d calls, %d different states of the disk", len(calls), len(crashes))
}

// crashesOf returns the power losses to try: one for each different content that the disk may have after each call.
func crashesOf(t *testing.T, dir string, files map[string][]byte, calls []call, torn int) (crashes []crash) {
	t.Helper()
	d := newDisk(dir, files)
	random := rand.New(rand.NewPCG(1, 2))
	seen := map[[sha256.Size]byte]bool{}
	steps, faulty := 0, false
	add := func(after string, image map[string][]byte) {
		sum := sha256.New()
		fmt.Fprint(sum, steps)
		for _, name := range slices.Sorted(maps.Keys(image)) {
			fmt.Fprintf(sum, "%q %d ", name, len(image[name]))
			sum.Write(image[name])
		}
		if key := [sha256.Size]byte(sum.Sum(nil)); !seen[key] {
			seen[key] = true
			crashes = append(crashes, crash{after, image, steps, faulty})
		}
	}
	for _, c := range calls {
		steps += c.lines()
		faulty = faulty || c.injected
		if c.lines() == 0 && !d.apply(t, c) {
			continue
		}
		add(c.String(), d.image(true, nil))
		add(c.String()+", without the unsynced data", d.image(false, nil))
		for range torn {
			add(c.String()+", with parts of the unsynced data", d.image(false, random))
		}
	}
	return crashes
}

// possibleStates returns the states that a restart after a crash may find. The first is the one before the step that was
// in progress. Another is the one after it. If a revocation failed with an unknown result, the state with the key revoked
// is possible as well.
func possibleStates(c crash, steps []step, states []state) []state {
	before := states[c.steps]
	all := []state{before}
	if c.steps+1 < len(states) {
		all = append(all, states[c.steps+1])
	}
	for _, s := range steps[max(0, c.steps-1):min(c.steps+1, len(steps))] {
		if s.needsRestart() && s.Did == "revoke a" {
			revoked := before
			revoked.Accepted = slices.DeleteFunc(slices.Clone(revoked.Accepted), func(key string) bool { return key == revoked.Issued[0] })
			all = append(all, revoked)
		}
	}
	return all
}

// checkRecovery starts a server twice on the image of a crash and checks that it has one of the possible states, of
// which the first is the last acknowledged one.
func checkRecovery(t *testing.T, dir string, c crash, possible []state, issued []string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	writeFiles(t, dir, c.image)
	before := possible[0]
	for again := range 2 { // the second start must find what the first one recovered
		srv, err := start(dir)
		if err != nil {
			return err
		}
		got, err := observe(srv, issued)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(possible, got.same) {
			return fmt.Errorf("the state is neither the one before nor the one after the step: %d keys accepted (before %d), sandboxes %v (before %v), %d requests (before %d)",
				len(got.Accepted), len(before.Accepted), got.Sandboxes, before.Sandboxes, got.Requests, before.Requests)
		}
		if err := checkAudit(srv, before.Head); err != nil {
			return err
		}
		if again == 0 { // the log can be written
			if err := srv.Audit(audit.Event{Action: audit.ServerStart, Actor: audit.ActorServer}); err != nil {
				return err
			}
		}
		before, possible = got, []state{got}
		if err := srv.Close(); err != nil {
			return err
		}
		entries, err := os.ReadDir(dir)
		if err != nil {
			return err
		}
		var names []string
		for _, e := range entries {
			switch name := e.Name(); {
			case name == "keyring.json.new": // a crash may leave it; the next reset removes it
			case name == "ballast", strings.HasPrefix(name, "audit-"):
			default:
				names = append(names, e.Name())
			}
		}
		if want := []string{"audit.jsonl", "keyring.json", "msb.db", "msbd.lock"}; !slices.Equal(names, want) {
			return fmt.Errorf("the directory has %v, want %v", names, want)
		}
	}
	return nil
}
