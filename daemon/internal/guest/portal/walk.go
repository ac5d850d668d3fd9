package portal

import (
	"context"
	"io"
	"os"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

// maxDepth limits how many directories of a tree contain each other. A walk keeps each of them open.
const maxDepth = 1000

// perDirectory is what an open directory needs in memory, in the portal and in the kernel, in bytes.
const perDirectory = 1 << 10

// walk is a way through a tree. All levels share one path, because the paths of all levels of a deep tree would need much
// memory.
type walk struct {
	ctx    context.Context
	memory *memory
	path   []byte // the absolute path of the current file; empty for /
	depth  int    // how many directories of the tree the current file is in
}

// newWalk returns a walk that begins at path and ends with ctx. The caller must call end.
func newWalk(ctx context.Context, budget *limit.Budget, path string) *walk {
	return &walk{ctx: ctx, memory: &memory{budget: budget}, path: []byte(strings.TrimSuffix(path, "/"))}
}

// end releases the memory of the walk.
func (w *walk) end() { w.memory.close() }

// current returns the absolute path of the current file.
func (w *walk) current() string {
	if len(w.path) == 0 {
		return "/"
	}
	return string(w.path)
}

// entries calls visit for the entries of the current file, which is the open directory dir, in lexical order. During the
// call, the entry is the current file. The first error of visit ends the walk, and so does the end of the context. Other
// errors than those of visit are gRPC statuses.
func (w *walk) entries(dir *os.File, visit func(name string) error) error {
	names, size, err := w.readNames(dir)
	if err != nil {
		return fileError(w.current(), err)
	}
	if len(names) > 0 && w.depth == maxDepth {
		return status.Errorf(codes.FailedPrecondition, "the tree has more than %d levels of directories, of which one is %s: use a directory further down",
			maxDepth, quote(w.current()))
	}
	w.depth++
	end := len(w.path)
	for _, name := range names {
		if err := w.ctx.Err(); err != nil {
			return status.FromContextError(err).Err()
		}
		w.path = append(append(w.path[:end], '/'), name...)
		if err := visit(name); err != nil {
			return err
		}
	}
	w.path = w.path[:end]
	w.depth--
	w.memory.release(size)
	return nil
}

// readNames returns the names in an open directory in lexical order, and how many bytes of memory they hold with the
// directory. There are none if the directory was removed meanwhile.
func (w *walk) readNames(dir *os.File) (names []string, held int, err error) {
	hold := func(n int) error {
		held += n
		return w.memory.hold(n)
	}
	err = hold(perDirectory)
	for err == nil {
		var more []string
		if more, err = dir.Readdirnames(1024); err != nil {
			break
		}
		size := 0
		for _, name := range more {
			size += perItem + len(name)
		}
		names = append(names, more...)
		if err = hold(size); err == nil {
			err = w.ctx.Err()
		}
	}
	if err != io.EOF && !vanished(err) {
		return nil, 0, err
	}
	slices.Sort(names)
	return names, held, nil
}
