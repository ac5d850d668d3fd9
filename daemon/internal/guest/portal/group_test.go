package portal

import (
	"os"
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
