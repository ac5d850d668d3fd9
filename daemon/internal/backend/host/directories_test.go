package host

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCheckDirectories(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give directories to other users")
	}
	top := t.TempDir() // below /tmp, where others can write but not replace
	mkdir := func(name string, mode os.FileMode, uid int) string {
		t.Helper()
		dir := filepath.Join(top, name)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(dir, uid, 0); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		return dir
	}
	private, foreign, public := mkdir("private", 0o755, 0), mkdir("foreign", 0o755, 65534), mkdir("public", 0o777, 0)
	sticky := mkdir("sticky", 0o777|os.ModeSticky, 0)
	link, foreignLink := filepath.Join(private, "link"), filepath.Join(sticky, "link")
	if err := errors.Join(os.Symlink(foreign, link), os.Symlink(private, foreignLink), os.Lchown(foreignLink, 65534, 0)); err != nil {
		t.Fatal(err)
	}
	for dir, want := range map[string]string{
		private:                           "",
		filepath.Join(private, "new/dir"): "",
		filepath.Join(sticky, "new"):      "",
		foreign:                           "belongs to user 65534",
		filepath.Join(foreign, "new/dir"): "belongs to user 65534",
		filepath.Join(public, "new"):      "can write to " + public,
		link:                              "belongs to user 65534",
		filepath.Join(link, "new"):        foreign + " belongs to user 65534",
		filepath.Join(foreignLink, "new"): foreignLink + " belongs to user 65534",
	} {
		c := CheckDirectories(private, dir)
		if (c.Status == OK) != (want == "") || !strings.Contains(c.Detail, want) {
			t.Errorf("%s: %+v, want %q", dir, c, want)
		}
	}
}
