package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
	"github.com/msbd/msbd/daemon/daemontest"
)

func TestEnvFileKeepsItsOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("only root can give a file to another user")
		return
	}
	for _, exists := range []bool{true, false} { // a new file gets the owner of its directory
		path := filepath.Join(t.TempDir(), ".env")
		owned := filepath.Dir(path)
		if exists {
			owned = path
			if err := os.WriteFile(path, nil, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Chown(owned, 1234, 5678); err != nil {
			t.Fatal(err)
		}
		f, err := prepareEnvFile(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.discard()
		if err := f.set("K", "v"); err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if got := ownerOf(info); got != (owner{1234, 5678}) || info.Mode().Perm() != 0o600 {
			t.Errorf("existing file: %t; got owner %v and mode %s", exists, got, info.Mode())
		}
	}
}

// swappedDirs returns a path that is one of two directories, and a function that replaces one with the other atomically.
// The first belongs to a user and the second to root, if root runs the test.
func swappedDirs(t *testing.T) (path string, dirs map[string]owner, swap func()) {
	t.Helper()
	top := t.TempDir()
	path, other := filepath.Join(top, "swapped"), filepath.Join(top, "link")
	theirs, ours := filepath.Join(top, "theirs"), filepath.Join(top, "ours")
	dirs = map[string]owner{theirs: {os.Geteuid(), os.Getegid()}, ours: {os.Geteuid(), os.Getegid()}}
	if os.Geteuid() == 0 {
		dirs[theirs] = owner{1234, 5678}
	}
	for dir, owner := range dirs {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(dir, owner.uid, owner.gid); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{path: theirs, other: ours} {
		if err := os.Symlink(target, link); err != nil {
			t.Fatal(err)
		}
	}
	return path, dirs, func() {
		if err := unix.Renameat2(unix.AT_FDCWD, path, unix.AT_FDCWD, other, unix.RENAME_EXCHANGE); err != nil {
			t.Error(err)
		}
	}
}

// wantNoResidue checks that a directory contains nothing but a file .env of the directory's owner, if anything.
func wantNoResidue(t *testing.T, dirs map[string]owner) {
	t.Helper()
	for dir, want := range dirs {
		entries, err := os.ReadDir(dir)
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			info, err := entry.Info()
			if err != nil {
				t.Fatal(err)
			}
			if entry.Name() != ".env" || ownerOf(info).uid != want.uid {
				t.Errorf("%s contains %s of user %d, want only .env of user %d", filepath.Base(dir), entry.Name(), ownerOf(info).uid, want.uid)
			}
		}
	}
}

// A directory that is replaced between two steps has no effect: the file is written to the directory that was opened first.
func TestFileIsWrittenToTheDirectoryOpenedFirst(t *testing.T) {
	path, dirs, swap := swappedDirs(t)
	first, err := filepath.EvalSymlinks(path)
	if err != nil {
		t.Fatal(err)
	}
	f, err := prepareEnvFile(filepath.Join(path, ".env"))
	if err != nil {
		t.Fatal(err)
	}
	swap()
	if err := f.set("K", "v"); err != nil {
		t.Error(err)
	}
	f.discard()
	if text, err := os.ReadFile(filepath.Join(first, ".env")); err != nil || string(text) != "K=v\n" {
		t.Errorf("got %q, %v", text, err)
	}
	wantNoResidue(t, dirs)

	if f, err = prepareEnvFile(filepath.Join(path, ".env")); err != nil {
		t.Fatal(err)
	}
	swap()
	f.discard()
	wantNoResidue(t, dirs)
}

// A user who swaps the directory all the time gets no residue and no file of another directory's owner.
func TestFileInSwappedDirectory(t *testing.T) {
	path, dirs, swap := swappedDirs(t)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				swap()
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	for range 200 {
		f, err := prepareEnvFile(filepath.Join(path, ".env"))
		if err != nil {
			t.Fatal(err)
		}
		if err := f.set("K", "v"); err != nil {
			t.Error(err)
		}
		f.discard()
	}
	wantNoResidue(t, dirs)
}

// The content of a file is given only to the owner of that file.
func TestEnvFileIsNotGivenToAnotherUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Log("only root can give a file to another user")
		return
	}
	path := filepath.Join(t.TempDir(), ".env")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, 1234, 5678); err != nil {
		t.Fatal(err)
	}
	f, err := prepareEnvFile(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.discard()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("SECRET=of-root"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := f.set("K", "v"); err == nil || !strings.Contains(err.Error(), "replaced by somebody else") {
		t.Errorf("got %v, want an error", err)
	}
}

// A key whose file cannot be put in its place is revoked, and no file contains it.
func TestKeyThatCannotBeWrittenIsRevoked(t *testing.T) {
	dir, err := os.MkdirTemp("", "msb") // short, because a socket's path is limited
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s, err := daemontest.Start(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	parent := t.TempDir()
	path := filepath.Join(parent, ".env")
	var id string
	app := newApp()
	app.Commands = append(app.Commands, &cli.Command{Name: "create", Flags: newKeyFlags, Action: func(c *cli.Context) error {
		return newKey(c, func(a *client.Admin) (newKeyInfo, error) {
			resp, err := a.CreateKey(c.Context, &adminv1.CreateKeyRequest{})
			id = resp.GetInfo().GetId()
			// While the server creates the key, somebody puts a directory there.
			if err := os.Mkdir(path, 0o700); err != nil {
				t.Error(err)
			}
			return newKeyInfo{secret: resp.GetKey(), key: resp.GetInfo()}, err
		})
	}})
	socket := filepath.Join(dir, "run", "msbd.sock")
	err = app.RunContext(t.Context(), []string{"msb", "--socket", socket, "create", "--env-file", path})
	if err == nil || !strings.Contains(err.Error(), "so it was revoked") {
		t.Errorf("got %v", err)
	}
	a := &client.Admin{Socket: socket}
	defer a.Close()
	key, err := a.Key(t.Context(), id)
	if err != nil || key.GetState() != adminv1.KeyState_KEY_STATE_REVOKED || time.Since(key.GetRevokedAt().AsTime()) > time.Minute {
		t.Errorf("the key: %v, %v", key, err)
	}
	if entries, err := os.ReadDir(parent); err != nil || len(entries) != 1 {
		t.Errorf("files in the directory: %v, %v", entries, err)
	}
}
