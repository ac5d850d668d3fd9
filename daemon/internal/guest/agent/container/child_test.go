package container

import (
	"os"
	"path/filepath"
	"testing"
)

func TestHomeOf(t *testing.T) {
	const passwd = "root:x:0:0:root:/root:/bin/sh\nshort:x\nodd:x:7:7::nowhere:/bin/sh\nlast:x:8:8::/home/last:/bin/sh"
	for uid, want := range map[uint32]string{0: "/root", 7: "/", 8: "/home/last", 9: "/"} {
		if got := homeOf(passwd, uid); got != want {
			t.Errorf("homeOf user %d = %q, want %q", uid, got, want)
		}
	}
}

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"run": 0o755, "data": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	env := []string{"PATH=/nosuch:" + dir}
	for name, want := range map[string]string{"run": filepath.Join(dir, "run"), "./x/run": "./x/run"} {
		if got, err := lookPath(name, env); err != nil || got != want {
			t.Errorf("lookPath(%q) = %q, %v; want %q", name, got, err, want)
		}
	}
	for _, name := range []string{"data", "absent"} {
		if got, err := lookPath(name, env); err == nil {
			t.Errorf("lookPath(%q) = %q, want an error", name, got)
		}
	}
}
