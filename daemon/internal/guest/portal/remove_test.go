package portal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

// endingContext is a context that has ended once Err was called a number of times.
type endingContext struct {
	context.Context
	calls atomic.Int64 // that are left
}

func (c *endingContext) Err() error {
	if c.calls.Add(-1) < 0 {
		return context.Canceled
	}
	return nil
}

func endAfter(t testing.TB, calls int64) context.Context {
	c := &endingContext{Context: t.Context()}
	c.calls.Store(calls)
	return c
}

// wideTree creates n directories below root with a file in each, and returns root.
func wideTree(t testing.TB, root string, n int) string {
	t.Helper()
	for i := range n {
		dir := filepath.Join(root, fmt.Sprint(i))
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "file"), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

func count(t testing.TB, dir string) int {
	t.Helper()
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(names)
}

func TestRemoveTree(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	wideTree(t, in("wide"), 100)
	if err := os.Mkdir(in("deep"), 0o700); err != nil {
		t.Fatal(err)
	}
	deepTree(t, in("deep"), "d", 3000, "")
	wideTree(t, in("kept"), 1)
	for _, link := range []string{"link", "wide/link", "wide/0/link"} {
		if err := os.Symlink(in("kept"), in(link)); err != nil {
			t.Fatal(err)
		}
	}
	// It is enough for removeDepth directories.
	budget := limit.NewBudget((removeDepth+1)*perRemoved, (removeDepth+1)*perRemoved)
	for _, name := range []string{"wide", "deep", "link", "missing"} {
		if err := removeTree(t.Context(), budget, in(name)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if n := count(t, dir); n != 1 || count(t, in("kept/0")) != 1 {
		t.Errorf("%d files are left, want the one that links lead to", n)
	}
	if err := removeTree(t.Context(), limit.NewBudget(perRemoved, perRemoved), in("kept")); status.Code(err) != codes.ResourceExhausted {
		t.Errorf("two levels with the memory for one: error %v, want ResourceExhausted", err)
	}
	if held, _ := budget.Held(); held != 0 {
		t.Errorf("%d bytes are held in the end", held)
	}
}

func TestRemoveTreeEndsWithContext(t *testing.T) {
	dir := wideTree(t, t.TempDir(), 200)
	if err := removeTree(endAfter(t, 100), newTreeMemory(), dir); !errors.Is(err, context.Canceled) {
		t.Errorf("got error %v, want context.Canceled", err)
	}
	if n := count(t, dir); n < 150 || n == 200 {
		t.Errorf("%d of 200 directories are left, want some less", n)
	}
}

// TestRemoveTreeFollowsNoLink replaces a directory by a link while the directory is removed.
func TestRemoveTreeFollowsNoLink(t *testing.T) {
	dir := t.TempDir()
	outside := wideTree(t, filepath.Join(dir, "outside"), 1)
	for range 300 {
		tree := wideTree(t, filepath.Join(dir, "tree"), 3)
		link := filepath.Join(dir, "link")
		if err := os.Symlink(outside, link); err != nil {
			t.Fatal(err)
		}
		exchanged := make(chan struct{})
		go func() {
			defer close(exchanged)
			for unix.Renameat2(unix.AT_FDCWD, link, unix.AT_FDCWD, filepath.Join(tree, "2"), unix.RENAME_EXCHANGE) == nil {
			}
		}()
		for { // until no exchange adds to it meanwhile
			if err := removeTree(t.Context(), newTreeMemory(), tree); err == nil {
				break
			}
		}
		<-exchanged
		if count(t, outside) != 1 || count(t, filepath.Join(outside, "0")) != 1 {
			t.Fatal("a file outside was removed")
		}
		if err := os.RemoveAll(link); err != nil {
			t.Fatal(err)
		}
	}
}

// A canceled move to another file system changes nothing.
func TestMoveByCopyEndsWithContext(t *testing.T) {
	dir := t.TempDir()
	source, destination := wideTree(t, filepath.Join(dir, "source"), 100), filepath.Join(dir, "destination")
	budget := newTreeMemory()
	if err := moveByCopy(endAfter(t, 100), budget, source, destination); !errors.Is(err, context.Canceled) && status.Code(err) != codes.Canceled {
		t.Errorf("got error %v, want that it is canceled", err)
	}
	if n := count(t, dir); n != 1 || count(t, source) != 100 {
		t.Errorf("%d files are left, want the complete source", n)
	}
	if err := moveByCopy(t.Context(), budget, source, destination); err != nil || count(t, dir) != 1 || count(t, destination) != 100 {
		t.Errorf("a move that is not canceled: error %v, %d files", err, count(t, dir))
	}
	if held, _ := budget.Held(); held != 0 {
		t.Errorf("%d bytes are held in the end", held)
	}
}
