//go:build !race

// The race detector leaves this file out. It would make each case many times slower, and finds nothing in tests where one
// goroutine opens a state directory, or traces or kills a child process.

package store_test

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/sys/randtest"
)

// base is an intact state directory to be damaged.
type base struct {
	name  string
	files map[string][]byte
	// keys maps each API key to whether it is accepted.
	keys map[string]bool
	// exact is set if every accepted key must still be accepted when the damaged state opens at all.
	exact bool
}

// bases returns state directories with every kind of key, which differ in their last changes.
func bases(t *testing.T) []base {
	t.Helper()
	old, tokens := schema1(t)
	good := map[string]bool{}
	for description, key := range tokens {
		good[key] = description != "expired" && description != "reset"
	}
	all := []base{{"schema 1", old, maps.Clone(good), false}}

	dir := t.TempDir()
	writeFiles(t, dir, old)
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	add := func(name string, change func(srv *server) error) {
		t.Helper()
		srv, err := start(dir)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(change(srv), srv.Close()); err != nil {
			t.Fatal(err)
		}
		files := map[string][]byte{}
		for _, name := range []string{"msb.db", "audit.jsonl", "keyring.json"} {
			if files[name], err = os.ReadFile(filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
		all = append(all, base{name, files, maps.Clone(good), true})
	}
	add("sandboxes and many keys", func(srv *server) error {
		var err error
		for i := range 100 {
			secret, _, issued := srv.issuer.Issue(t.Context(), keys.IssueRequest{Name: fmt.Sprint("key-", i)})
			good[secret.Reveal()] = true
			r := sandbox.Record{ID: fmt.Sprint("box-", i), State: sandbox.Failed}
			err = errors.Join(err, issued, srv.PutSandbox(r))
		}
		return err
	})
	add("a revoked key", func(srv *server) error {
		secret, r, err := srv.issuer.Issue(t.Context(), keys.IssueRequest{})
		good[secret.Reveal()] = false
		_, revoked := srv.issuer.Revoke(t.Context(), r.ID, 0)
		return errors.Join(err, revoked)
	})
	return all
}

// However the files of a state directory are damaged, the server either refuses to start with a classified error, or
// repairs the damage. Then everything is as before, and it can be changed. A revoked or expired key is never accepted,
// and nothing panics.
func TestDamage(t *testing.T) {
	t.Parallel()
	cases := 500
	if soak {
		cases = 100_000
	}
	seed := randtest.Seed(t)
	all := bases(t)
	root := t.TempDir()
	var refused, opened, n atomic.Int64
	var wg sync.WaitGroup
	for worker := range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			dir := filepath.Join(root, fmt.Sprint(worker))
			for i := n.Add(1); i <= int64(cases) && !t.Failed(); i = n.Add(1) {
				random := rand.New(rand.NewPCG(seed, uint64(i)))
				b := all[random.IntN(len(all))]
				files := maps.Clone(b.files)
				description := damage(random, files)
				ok, err := checkDamaged(t, dir, b, files)
				if err != nil {
					t.Errorf("case %d, %s, %s: %v", i, b.name, description, err)
				}
				if ok {
					opened.Add(1)
				} else {
					refused.Add(1)
				}
			}
		})
	}
	wg.Wait()
	if refused.Load() < int64(cases)/10 || opened.Load() < int64(cases)/10 {
		t.Errorf("%d refused, %d opened: want at least a tenth of all cases of each", refused.Load(), opened.Load())
	}
	t.Logf("%d refused, %d opened unchanged", refused.Load(), opened.Load())
}

// damage damages one of the files and describes how.
func damage(random *rand.Rand, files map[string][]byte) string {
	names := slices.Sorted(maps.Keys(files))
	name := names[random.IntN(len(names))]
	if random.IntN(2) == 0 {
		name = "msb.db"
	}
	intact := files[name]
	b := bytes.Clone(intact)
	at, kind := random.IntN(len(b)), ""
	// Most bytes of a store are unused zeros, so choose one that is not zero half of the time.
	if used := bytes.IndexFunc(b[at:], func(r rune) bool { return r != 0 }); used > 0 && random.IntN(2) == 0 {
		at += used
	}
	span := b[at:min(len(b), at+1+random.IntN(5000))]
	switch random.IntN(8) {
	case 0, 1, 2:
		kind = "flipped a bit"
		b[at] ^= 1 << random.IntN(8)
	case 3:
		kind = "flipped bits"
		for range 2 + random.IntN(7) {
			b[random.IntN(len(b))] ^= 1 << random.IntN(8)
		}
	case 4:
		kind = "truncated"
		b = b[:at]
	case 5:
		kind = "garbage"
		for i := range span {
			span[i] = byte(random.Uint32())
		}
	case 6:
		kind = "zeros"
		clear(span)
	case 7:
		kind = "copied another sector"
		from := random.IntN(len(b)) / sector * sector
		copy(b[at/sector*sector:], b[from:min(len(b), from+sector)])
	}
	files[name] = b
	return fmt.Sprintf("%s: %s at %d of %d", name, kind, at, len(intact))
}

// checkDamaged starts a server on damaged files of a base. It reports whether the server started, and returns an error
// if the server did not treat the damage as TestDamage demands.
func checkDamaged(t *testing.T, dir string, b base, files map[string][]byte) (opened bool, err error) {
	t.Helper()
	if err := errors.Join(os.RemoveAll(dir), os.Mkdir(dir, 0o700)); err != nil {
		return false, err
	}
	writeFiles(t, dir, files)
	srv, err := start(dir)
	if errdefs.IsDataLoss(err) || errdefs.IsFailedPrecondition(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("refused with an unclassified error: %w", err)
	}
	defer srv.Close()
	for key, good := range b.keys {
		_, err := srv.verifier.Verify(key, netip.Addr{})
		if err == nil && !good {
			return true, errors.New("a revoked or expired key is accepted")
		}
		if err != nil && good && b.exact {
			return true, errors.New("a live key is refused")
		}
	}
	if err := srv.Health(); err != nil {
		return true, err
	}
	log, err := os.ReadFile(filepath.Join(dir, "audit.jsonl"))
	if err != nil {
		return true, err
	}
	defer func() { // the state can be changed
		_, _, issued := srv.issuer.Issue(t.Context(), keys.IssueRequest{})
		if !b.exact && errdefs.IsFailedPrecondition(issued) {
			issued = nil // schema 1 has no checksums, so a damaged time may be in the future
		}
		err = errors.Join(err, issued)
	}()
	if !b.exact {
		return true, nil
	}
	if _, err := srv.VerifyAudit(t.Context()); err != nil {
		if !errdefs.IsDataLoss(err) || srv.AuditProblem() == nil {
			return true, fmt.Errorf("VerifyAudit: %w; AuditProblem: %w", err, srv.AuditProblem())
		}
	} else if !bytes.Equal(log, b.files["audit.jsonl"]) {
		return true, errors.New("the audit log was changed, but VerifyAudit reports no problem")
	}
	return true, nil
}
