package portal

import (
	"os"
	"path/filepath"
	"testing"
	"time"
)

// Many cgroups that are released at once are removed, and one is created for the next process. The cgroups are directories of
// another file system.
func TestReleasedGroups(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	g := &groups{dir: dir}
	defer g.close()
	var all []*openGroup
	for range 200 {
		created, err := g.create()
		if err != nil {
			t.Fatal(err)
		}
		created.dir.Close()
		all = append(all, created)
	}
	for _, created := range all {
		created.release()
	}
	var left []os.DirEntry
	for len(left) != 1 || left[0].Name() != "201" {
		if left, err = os.ReadDir(dir.Name()); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond)
	}
	created, err := g.create()
	if err != nil {
		t.Fatal(err)
	}
	defer created.dir.Close()
	if created.name != "201" {
		t.Errorf("the next cgroup is %s, want 201, which exists", created.name)
	}
}

// A program gets half of the processes that are left, and at least one. The files are not those of a cgroup.
func TestShare(t *testing.T) {
	for _, tt := range []struct {
		limit, count string
		want         uint64
	}{
		{"2342\n", "0\n", 1171}, {"2342\n", "1171\n", 586}, {"10\n", "9\n", 1}, {"10\n", "10\n", 1}, {"10\n", "12\n", 1}, {"max\n", "3\n", 0},
	} {
		l := &load{limit: fileWith(t, tt.limit), count: fileWith(t, tt.count)}
		if got := l.share(); got != tt.want {
			t.Errorf("with a limit of %q and %q processes, the share is %d, want %d", tt.limit, tt.count, got, tt.want)
		}
	}
	if got := (&load{}).share(); got != 0 {
		t.Errorf("without the files, the share is %d, want 0", got)
	}
}

func fileWith(t *testing.T, content string) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}
