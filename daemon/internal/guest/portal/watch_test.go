package portal

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

// watchAll watches everything below root.
func watchAll(ctx context.Context, budget *limit.Budget, root string, send func(*portalv1.WatchFilesResponse) error) (*watcher, error) {
	return newWatcher(ctx, budget, &portalv1.WatchFilesRequest{Recursive: true}, root, send)
}

func TestWatcherLimits(t *testing.T) {
	dir := wideTree(t, t.TempDir(), 200)
	for what, tt := range map[string]struct {
		ctx  context.Context
		size int // of the memory
		code codes.Code
	}{
		"enough memory":   {t.Context(), 64 << 10, codes.OK},
		"little memory":   {t.Context(), 8 << 10, codes.ResourceExhausted},
		"a canceled call": {endAfter(t, 50), 64 << 10, codes.Canceled},
	} {
		budget := limit.NewBudget(tt.size, tt.size)
		w, err := watchAll(tt.ctx, budget, dir, nil)
		if status.Code(err) != tt.code {
			t.Errorf("%s: got error %v, want %v", what, err, tt.code)
		}
		if err == nil {
			w.close()
		}
		if held, _ := budget.Held(); held != 0 {
			t.Errorf("%s: %d bytes are held in the end", what, held)
		}
	}
}

// A watcher holds memory for the directories that it watches at the moment.
func TestWatcherForgetsDirectories(t *testing.T) {
	dir, elsewhere := t.TempDir(), t.TempDir()
	change := func() error {
		for i := range 20 {
			name := filepath.Join(dir, fmt.Sprint(i))
			if err := errors.Join(os.MkdirAll(filepath.Join(name, "a/b"), 0o700), os.Rename(name, name+"-moved")); err != nil {
				return err
			}
			if i%2 == 0 {
				if err := os.Rename(name+"-moved", filepath.Join(elsewhere, fmt.Sprint(i))); err != nil {
					return err
				}
			} else if err := os.RemoveAll(name + "-moved"); err != nil {
				return err
			}
		}
		return os.MkdirAll(filepath.Join(dir, "end"), 0o700)
	}
	ended := errors.New("ended")
	w, err := watchAll(t.Context(), newTreeMemory(), dir, func(resp *portalv1.WatchFilesResponse) error {
		switch {
		case resp.GetType() == portalv1.WatchFilesResponse_TYPE_STARTED:
			return change()
		case string(resp.GetPath()) == "end":
			return ended
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	defer w.close()
	if err := w.run(); err != ended {
		t.Fatal(err)
	}
	want := 0
	for _, rel := range w.directories {
		want += pathSize(rel)
	}
	for rel := range w.listed {
		want += pathSize(rel)
	}
	if len(w.directories) != 1 || w.memory.held != want {
		t.Errorf("%d bytes are held for %q and %d listed paths, want %d for one directory", w.memory.held, w.directories, len(w.listed), want)
	}
}

// What a watcher remembers of new directories is limited.
func TestWatcherListedPaths(t *testing.T) {
	for _, size := range []int{maxTreeMemory, 64 << 10} {
		budget := limit.NewBudget(size, size)
		w, err := watchAll(t.Context(), budget, t.TempDir(), nil)
		if err != nil {
			t.Fatal(err)
		}
		for i := range maxListed + 100 {
			if w.list(fmt.Sprint(i)); len(w.listed) > maxListed {
				t.Fatalf("%d paths are remembered", len(w.listed))
			}
		}
		if size == maxTreeMemory && (len(w.listed) != 100 || !w.unlist(fmt.Sprint(maxListed)) || w.unlist(fmt.Sprint(maxListed))) {
			t.Errorf("%d paths are remembered, want the last 100", len(w.listed))
		}
		w.forgetListed()
		if w.memory.held != pathSize("") {
			t.Errorf("%d bytes are held for no listed paths", w.memory.held)
		}
		w.close()
	}
}
