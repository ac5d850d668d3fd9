package portal

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

// deepTree creates depth directories with this name below root, each in the one before, and a file in the last.
func deepTree(t testing.TB, root, name string, depth int, content string) {
	t.Helper()
	dir, err := os.Open(root)
	for range depth {
		if err == nil {
			err = unix.Mkdirat(int(dir.Fd()), name, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
		above := dir
		dir, err = openAt(above, name, unix.O_DIRECTORY)
		above.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	fd, err := unix.Openat(int(dir.Fd()), "last", unix.O_CREAT|unix.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	last := os.NewFile(uintptr(fd), "last")
	defer last.Close()
	if _, err := last.WriteString(content); err != nil {
		t.Fatal(err)
	}
}

// writerFunc is an io.Writer.
type writerFunc func(data []byte)

func (f writerFunc) Write(data []byte) (int, error) {
	f(data)
	return len(data), nil
}

// The memory that the archive of a tree needs is not proportional to the square of the depth.
func TestArchiveOfDeepTree(t *testing.T) {
	root := t.TempDir()
	const content = "in the last directory"
	deepTree(t, root, strings.Repeat("d", 200), maxDepth-1, content)
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	budget, before, growth := newTreeMemory(), heap(), int64(-1)
	out := writerFunc(func(data []byte) {
		if bytes.Contains(data, []byte(content)) {
			growth = heap() - before
		}
	})
	if err := archive(t.Context(), budget, out, root, "x", false); err != nil {
		t.Fatal(err)
	}
	if growth < 0 || growth > 8<<20 {
		t.Errorf("in the last directory, archive needed %d MiB, want a few", growth>>20)
	}
	if held, _ := budget.Held(); held != 0 {
		t.Errorf("%d bytes are held in the end", held)
	}
}

// listAll lists everything below root.
func listAll(ctx context.Context, budget *limit.Budget, root string, send func(*portalv1.FileInfo) error) error {
	dir, err := os.Open(root)
	if err != nil {
		return err
	}
	defer dir.Close()
	l := lister{newWalk(ctx, budget, root), newNameTable(), send}
	defer l.end()
	return l.list(dir, 1<<32-1)
}

func TestWalkLimits(t *testing.T) {
	deepest, tooDeep, many, links := t.TempDir(), t.TempDir(), t.TempDir(), t.TempDir()
	deepTree(t, deepest, "d", maxDepth-1, "")
	deepTree(t, tooDeep, "d", maxDepth, "")
	for i := range 5000 {
		if err := os.WriteFile(filepath.Join(many, fmt.Sprint(i)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 20 {
		dir := filepath.Join(links, fmt.Sprint(i))
		for _, sub := range []string{"a", "b"} {
			if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		for j := range 50 {
			first := filepath.Join(dir, "a", fmt.Sprint(j))
			if err := os.WriteFile(first, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Link(first, filepath.Join(dir, "b", fmt.Sprint(j))); err != nil {
				t.Fatal(err)
			}
		}
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tt := range []struct {
		what, root string
		ctx        context.Context
		size       int // of the memory
		list       codes.Code
		archive    codes.Code
		text       string
	}{
		{"the deepest tree", deepest, t.Context(), 4 << 20, codes.OK, codes.OK, ""},
		{"a tree that is too deep", tooDeep, t.Context(), 4 << 20, codes.FailedPrecondition, codes.FailedPrecondition, "more than 1000 levels"},
		{"a deep tree and little memory", deepest, t.Context(), 512 << 10, codes.ResourceExhausted, codes.ResourceExhausted, "of memory that the portal has"},
		{"a large directory", many, t.Context(), 4 << 20, codes.OK, codes.OK, ""},
		{"a large directory and little memory", many, t.Context(), 128 << 10, codes.ResourceExhausted, codes.ResourceExhausted, "of memory that the portal has"},
		{"many links", links, t.Context(), 4 << 20, codes.OK, codes.OK, ""},
		{"many links and little memory", links, t.Context(), 128 << 10, codes.OK, codes.ResourceExhausted, "of memory that the portal has"},
		{"a canceled call", many, canceled, 4 << 20, codes.Canceled, codes.Canceled, ""},
	} {
		budget := limit.NewBudget(tt.size, tt.size)
		check := func(what string, err error, want codes.Code) {
			if status.Code(err) != want || want != codes.OK && !strings.Contains(err.Error(), tt.text) {
				t.Errorf("%s of %s: got error %v, want %v with %q", what, tt.what, err, want, tt.text)
			}
			if held, _ := budget.Held(); held != 0 {
				t.Errorf("%s of %s: %d bytes are held in the end", what, tt.what, held)
			}
		}
		sent := 0
		check("list", listAll(tt.ctx, budget, tt.root, func(*portalv1.FileInfo) error { sent++; return nil }), tt.list)
		check("archive", archive(tt.ctx, budget, io.Discard, tt.root, "x", false), tt.archive)
		if tt.ctx == canceled && sent > 0 {
			t.Errorf("%s: %d files were listed", tt.what, sent)
		}
	}
}

func TestNameTableForgets(t *testing.T) {
	names, lookups := make(map[uint32]string), 0
	lookup := func(id string) (string, error) {
		lookups++
		return "name " + id, nil
	}
	for range 2 {
		for id := range uint32(maxNames) {
			if name := lookupName(names, id, lookup); name != fmt.Sprint("name ", id) {
				t.Fatalf("%d has the name %q", id, name)
			}
		}
	}
	if lookups != maxNames {
		t.Errorf("%d names were looked up %d times", maxNames, lookups)
	}
	for id := range uint32(100_000) {
		lookupName(names, id, lookup)
		if len(names) > maxNames {
			t.Fatalf("%d names are kept", len(names))
		}
	}
}
