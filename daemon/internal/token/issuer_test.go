package token

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestKeysOutliveARestart(t *testing.T) {
	store := new(memory)
	path := filepath.Join(t.TempDir(), "state", "keyring.json")
	i, _ := openIssuer(t, store, path)
	key, r := issue(t, i, IssueRequest{Namespace: "a"})
	before := i.SigningKey()

	again, v := openIssuer(t, store, path)
	if p, err := v.Verify(key); err != nil || p.KeyID != r.ID {
		t.Errorf("the key speaks for %+v, %v", p, err)
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

func TestReset(t *testing.T) {
	store := new(memory)
	path := filepath.Join(t.TempDir(), "state", "keyring.json")
	i, v := openIssuer(t, store, path)
	seen, _ := issue(t, i, IssueRequest{})
	unseen, _ := issue(t, i, IssueRequest{Namespace: "a"})
	if _, err := v.Verify(seen); err != nil {
		t.Fatal(err)
	}
	before := i.SigningKey()
	n, err := i.Reset(context.Background())
	if err != nil || n != 2 {
		t.Errorf("Reset: %d, %v", n, err)
	}
	after := i.SigningKey()
	if after.ID == before.ID || after.InstanceID != before.InstanceID {
		t.Errorf("the signing key was %+v and is %+v", before, after)
	}
	fresh, _ := issue(t, i, IssueRequest{})
	check := func(v *Verifier) {
		t.Helper()
		refused(t, v, seen)
		refused(t, v, unseen)
		if _, err := v.Verify(fresh); err != nil {
			t.Error(err)
		}
	}
	check(v)
	again, v := openIssuer(t, store, path)
	check(v)
	if c := again.Counts(); c != (Counts{Live: 1, Revoked: 2}) {
		t.Errorf("counts are %+v", c)
	}
}

// Whatever ends a reset after its first step, no key from before it works again.
func TestResetCutShort(t *testing.T) {
	store := new(memory)
	path := filepath.Join(t.TempDir(), "state", "keyring.json")
	i, v := openIssuer(t, store, path)
	key, _ := issue(t, i, IssueRequest{})

	store.fail = errors.New("disk full")
	if _, err := i.Reset(context.Background()); !errors.Is(err, store.fail) {
		t.Errorf("Reset: %v", err)
	}
	refused(t, v, key)
	if store.records[0].Revoked() {
		t.Fatal("the store took the mark")
	}
	if _, _, err := Open(Options{KeyringPath: path, Store: store, Log: slog.New(slog.DiscardHandler)}); !errors.Is(err, store.fail) {
		t.Errorf("Open without a store that takes the mark: %v", err)
	}
	store.fail = nil
	_, v = openIssuer(t, store, path)
	refused(t, v, key)
	if !store.records[0].Revoked() {
		t.Error("the next start did not finish the reset")
	}
}

// A new keyring that is in place counts, also when the disk does not vouch for it: keys made from now
// on must be those that the next start takes.
func TestResetOnAFailingDisk(t *testing.T) {
	store, path := new(memory), filepath.Join(t.TempDir(), "state", "keyring.json")
	i, v := openIssuer(t, store, path)
	old, _ := issue(t, i, IssueRequest{})
	sound := syncDir
	syncDir = func(string) error { return syscall.EIO }
	_, err := i.Reset(context.Background())
	syncDir = sound
	if !errors.Is(err, syscall.EIO) {
		t.Errorf("Reset: %v", err)
	}
	refused(t, v, old)
	fresh, _ := issue(t, i, IssueRequest{})
	_, v = openIssuer(t, store, path)
	refused(t, v, old)
	if _, err := v.Verify(fresh); err != nil {
		t.Errorf("after a restart, a key made after the reset: %v", err)
	}
}

// A reset that cannot even begin changes nothing.
func TestResetThatCannotBegin(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state", "keyring.json")
	i, v := openIssuer(t, new(memory), path)
	key, _ := issue(t, i, IssueRequest{})
	if err := os.MkdirAll(filepath.Join(path+".new", "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := i.Reset(context.Background()); err == nil {
		t.Error("no error")
	}
	if _, err := v.Verify(key); err != nil {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := i.Reset(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Reset for a caller who has gone: %v", err)
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
			t.Fatalf("no %q in %s", old, data)
		}
	}
	tests := map[string]struct {
		damage func(t *testing.T, path string)
		is     func(error) bool
		// reset says whether --reset-key gets over it.
		reset bool
	}{
		"empty":            {write(""), errdefs.IsDataLoss, true},
		"garbage":          {write("\x00\xff garbage"), errdefs.IsDataLoss, true},
		"null":             {write("null"), errdefs.IsDataLoss, true},
		"endless":          {write(strings.Repeat(" ", 1<<20)), errdefs.IsDataLoss, true},
		"no seed":          {replace(`"seed":"`, `"seed":"","x":"`), errdefs.IsDataLoss, true},
		"short seed":       {replace(`"seed":"`, `"seed":"AAAA","x":"`), errdefs.IsDataLoss, true},
		"changed birth":    {replace(`"created_at":"2`, `"created_at":"1`), errdefs.IsDataLoss, true},
		"changed instance": {replace(`"instance_id":"`, `"instance_id":"0`), errdefs.IsDataLoss, true},
		"unknown member":   {replace(`{`, `{"extra":1,`), errdefs.IsDataLoss, true},
		"version 0":        {replace(`"version":1`, `"version":0`), errdefs.IsDataLoss, true},
		"newer version":    {replace(`"version":1`, `"version":2`), errdefs.IsFailedPrecondition, false},
		"gone": {func(t *testing.T, path string) {
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
		"another user's": {func(t *testing.T, path string) {
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
			store := new(memory)
			path := filepath.Join(t.TempDir(), "state", "keyring.json")
			i, _ := openIssuer(t, store, path)
			key, _ := issue(t, i, IssueRequest{})
			seed := string(i.keyring.private.Reveal())
			tt.damage(t, path)
			opts := Options{KeyringPath: path, Store: store, Log: slog.New(slog.DiscardHandler)}
			_, _, err := Open(opts)
			if !tt.is(err) || !strings.Contains(err.Error(), filepath.Dir(path)) {
				t.Fatalf("Open: %v", err)
			}
			if strings.Contains(err.Error(), seed) {
				t.Error("the error has the seed")
			}
			if store.records[0].Revoked() {
				t.Error("keys were revoked all the same")
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

func TestOpenWithReset(t *testing.T) {
	store := new(memory)
	path := filepath.Join(t.TempDir(), "state", "keyring.json")
	i, _ := openIssuer(t, store, path)
	key, _ := issue(t, i, IssueRequest{})
	again, v, err := Open(Options{KeyringPath: path, Store: store, Reset: true, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	refused(t, v, key)
	if before, after := i.SigningKey(), again.SigningKey(); after.ID == before.ID || after.InstanceID != before.InstanceID ||
		time.Since(after.CreatedAt) > time.Hour {
		t.Errorf("the signing key was %+v and is %+v", before, after)
	}
	if !store.records[0].Revoked() {
		t.Error("the record is not marked")
	}
}
