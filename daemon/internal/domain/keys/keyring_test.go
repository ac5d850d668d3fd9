package keys

import (
	"crypto/ed25519"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/sys/randtest"
)

func TestKeysOutliveARestart(t *testing.T) {
	store := NewMemory()
	path := keyringPath(t)
	i, _ := openIssuer(t, store, path)
	key, r := issue(t, i, IssueRequest{Namespaces: []string{"a"}})
	before := i.SigningKey()

	again, v := openIssuer(t, store, path)
	if p, err := v.Verify(key, from); err != nil || p.KeyID != r.ID {
		t.Errorf("after a restart, the principal is %+v, %v", p, err)
	}
	if after := again.SigningKey(); after != before {
		t.Errorf("the signing key was %+v and is %+v", before, after)
	}
	for p, want := range map[string]os.FileMode{path: 0o600, filepath.Dir(path): 0o700} {
		info, err := os.Stat(p)
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", p, info.Mode(), err)
		}
	}
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(entries) != 1 {
		t.Errorf("the directory holds %v, %v", entries, err)
	}
}

func TestBadKeyringsAreRefused(t *testing.T) {
	write := func(text string) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	replace := func(old, new string) func(t *testing.T, path string) {
		return func(t *testing.T, path string) {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if changed := strings.Replace(string(data), old, new, 1); changed != string(data) {
				write(changed)(t, path)
				return
			}
			t.Fatalf("%q does not occur in %s", old, data)
		}
	}
	tests := map[string]struct {
		damage func(t *testing.T, path string)
		is     func(error) bool
		// reset is whether Open with Reset succeeds.
		reset bool
	}{
		"empty":            {write(""), errdefs.IsDataLoss, true},
		"garbage":          {write("\x00\xff garbage"), errdefs.IsDataLoss, true},
		"null":             {write("null"), errdefs.IsDataLoss, true},
		"too long":         {write(strings.Repeat(" ", 1<<20)), errdefs.IsDataLoss, true},
		"no seed":          {replace(`"seed":"`, `"seed":"","x":"`), errdefs.IsDataLoss, true},
		"short seed":       {replace(`"seed":"`, `"seed":"AAAA","x":"`), errdefs.IsDataLoss, true},
		"changed time":     {replace(`"created_at":"2`, `"created_at":"1`), errdefs.IsDataLoss, true},
		"changed instance": {replace(`"instance_id":"`, `"instance_id":"0`), errdefs.IsDataLoss, true},
		"unknown member":   {replace(`{`, `{"extra":1,`), errdefs.IsDataLoss, true},
		"version 0":        {replace(`"version":1`, `"version":0`), errdefs.IsDataLoss, true},
		"newer version":    {replace(`"version":1`, `"version":2`), errdefs.IsFailedPrecondition, false},
		"missing": {func(t *testing.T, path string) {
			if err := os.Remove(path); err != nil {
				t.Fatal(err)
			}
		}, errdefs.IsDataLoss, true},
		"open to others": {func(t *testing.T, path string) {
			if err := os.Chmod(path, 0o640); err != nil {
				t.Fatal(err)
			}
		}, errdefs.IsFailedPrecondition, false},
		"directory open to others": {func(t *testing.T, path string) {
			if err := os.Chmod(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
		}, errdefs.IsFailedPrecondition, false},
		"symbolic link": {func(t *testing.T, path string) {
			if err := errors.Join(os.Rename(path, path+".real"), os.Symlink(path+".real", path)); err != nil {
				t.Fatal(err)
			}
		}, errdefs.IsFailedPrecondition, false},
		"FIFO": {func(t *testing.T, path string) {
			if err := errors.Join(os.Remove(path), syscall.Mkfifo(path, 0o600)); err != nil {
				t.Fatal(err)
			}
		}, errdefs.IsFailedPrecondition, false},
		"owned by another user": {func(t *testing.T, path string) {
			if os.Geteuid() != 0 {
				t.Skip("needs root")
			}
			if err := os.Chown(path, 65534, -1); err != nil {
				t.Fatal(err)
			}
		}, errdefs.IsFailedPrecondition, false},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			store := NewMemory()
			path := keyringPath(t)
			i, _ := openIssuer(t, store, path)
			key, r := issue(t, i, IssueRequest{})
			seed := i.keyring.Load().private.Reveal()
			tt.damage(t, path)
			opts := options(store, path)
			_, _, err := Open(opts)
			if !tt.is(err) || !strings.Contains(err.Error(), filepath.Dir(path)) {
				t.Fatalf("Open: %v", err)
			}
			if strings.Contains(err.Error(), seed) {
				t.Error("the error contains the seed")
			}
			if store.Records()[r.ID].Revocation != "" {
				t.Error("Open failed but revoked keys")
			}
			opts.Reset = true
			_, v, err := Open(opts)
			if (err == nil) != tt.reset {
				t.Errorf("Open with Reset: %v", err)
			}
			if err == nil {
				refused(t, v, key)
			}
		})
	}
}

// A state directory that its user created is often readable by others. The error says what to do.
func TestStateDirectoryOpenToOthers(t *testing.T) {
	path := keyringPath(t)
	dir := filepath.Dir(path)
	if err := errors.Join(os.MkdirAll(dir, 0o700), os.Chmod(dir, 0o755)); err != nil {
		t.Fatal(err)
	}
	_, _, err := Open(options(NewMemory(), path))
	want := "the state directory " + dir + " is accessible to other users (mode 0755): run 'chmod 700 " + dir + "'"
	if err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "keyring") {
		t.Errorf("Open: %v, want %s", err, want)
	}
}

// A damaged keyring is either refused or decoded to the same keys as the intact one. The damage is a flipped bit, a
// truncation, or random bytes.
func TestNoDamagedKeyringIsUsed(t *testing.T) {
	t.Parallel()
	rnd := randtest.New(t)
	intact := seededKeyring(t, rnd)
	data, err := intact.encode()
	if err != nil {
		t.Fatal(err)
	}
	text := data.Reveal()
	check := func(damage string, text []byte) {
		t.Helper()
		ring, err := decodeKeyring(text)
		switch {
		case err == nil && (ring.keyID != intact.keyID || ring.private.Reveal() != intact.private.Reveal() || ring.instanceID != intact.instanceID):
			t.Errorf("%s: the keyring was decoded to a different key", damage)
		case err != nil && !errdefs.IsDataLoss(err) && !errdefs.IsFailedPrecondition(err):
			t.Errorf("%s: %v", damage, err)
		}
	}
	for n := range len(text) {
		for bit := range 8 {
			flipped := []byte(text)
			flipped[n] ^= 1 << bit
			check(fmt.Sprintf("bit %d of byte %d", bit, n), flipped)
		}
		if _, err := decodeKeyring([]byte(text[:n])); !errdefs.IsDataLoss(err) {
			t.Errorf("the first %d bytes: %v", n, err)
		}
	}
	for n := range iterations(t, 2000, 100_000) {
		damaged := []byte(text)
		for range 1 + rnd.IntN(8) {
			damaged[rnd.IntN(len(damaged))] = byte(rnd.Uint32())
		}
		check(fmt.Sprintf("random bytes %d", n), damaged)
	}
}

// seededKeyring is like newKeyring, but takes the random numbers from rnd, so that a test can be repeated.
func seededKeyring(t testing.TB, rnd *rand.Rand) *keyring {
	t.Helper()
	seed := make([]byte, ed25519.SeedSize)
	for n := range seed {
		seed[n] = byte(rnd.Uint32())
	}
	ring, err := keyringFrom(keyringFile{InstanceID: seededID(rnd), CreatedAt: schema1Time(rnd.IntN(1000)), Seed: seed})
	if err != nil {
		t.Fatal(err)
	}
	return ring
}

// seededID is like randomID, but takes the random numbers from rnd.
func seededID(rnd *rand.Rand) string { return fmt.Sprintf("%016x%016x", rnd.Uint64(), rnd.Uint64()) }
