package servetest

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// file is a file or directory of a fake sandbox.
type file struct {
	dir   bool
	data  []byte
	mode  uint32
	owner string
}

// files are the files of a fake sandbox by their absolute paths. They do not need parents, and there are no symbolic links. The
// disk is full below /full.
type files map[string]file

// inFiles calls do with the files of a sandbox and the absolute path of p.
func (f *Sandboxes) inFiles(n sandbox.Name, p sandbox.Path, do func(all files, at string) error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, err := f.find(n); err != nil {
		return err
	}
	if f.files == nil {
		f.files = map[sandbox.Name]files{}
	}
	if f.files[n] == nil {
		f.files[n] = files{}
	}
	return do(f.files[n], absolute(p))
}

// absolute returns an absolute path. A relative one begins at /srv.
func absolute(p sandbox.Path) string {
	if path.IsAbs(p.Path) {
		return path.Clean(p.Path)
	}
	return path.Join("/srv", p.Path)
}

// stat describes a file.
func (all files) stat(at string) (sandbox.FileInfo, error) {
	of, ok := all[at]
	if !ok {
		return sandbox.FileInfo{}, fmt.Errorf("%s does not exist in the sandbox: %w", at, errdefs.ErrNotFound)
	}
	info := sandbox.FileInfo{
		Path: at, Type: sandbox.RegularFile, Size: int64(len(of.data)), Mode: of.mode, User: of.owner, Group: of.owner,
		ModifiedAt: time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC),
	}
	if of.dir {
		info.Type = sandbox.Directory
	}
	return info, nil
}

// put creates or replaces a file.
func (all files) put(at string, of file, mode *uint32) (info sandbox.FileInfo, created bool, err error) {
	if strings.HasPrefix(at, "/full") {
		return info, false, fmt.Errorf("write %s: %w", at, sandbox.ErrSandboxFull)
	}
	if of.owner == "" {
		of.owner = "root"
	}
	if mode != nil {
		of.mode = *mode
	}
	_, exists := all[at]
	all[at] = of
	info, err = all.stat(at)
	return info, !exists, err
}

func (f *Sandboxes) StatFile(_ context.Context, n sandbox.Name, p sandbox.Path, _ bool) (info sandbox.FileInfo, err error) {
	err = f.inFiles(n, p, func(all files, at string) (err error) {
		info, err = all.stat(at)
		return err
	})
	return info, err
}

func (f *Sandboxes) ListFiles(_ context.Context, n sandbox.Name, p sandbox.Path, depth int, each func(sandbox.FileInfo) error) error {
	return f.inFiles(n, p, func(all files, at string) error {
		for _, entry := range slices.Sorted(maps.Keys(all)) {
			below, ok := strings.CutPrefix(entry, at+"/")
			if !ok || strings.Count(below, "/") >= depth {
				continue
			}
			info, err := all.stat(entry)
			if err == nil {
				err = each(info)
			}
			if err != nil {
				return err
			}
		}
		return nil
	})
}

func (f *Sandboxes) ReadFile(_ context.Context, n sandbox.Name, p sandbox.Path, offset, length int64) (info sandbox.FileInfo, data io.ReadCloser, err error) {
	err = f.inFiles(n, p, func(all files, at string) (err error) {
		if info, err = all.stat(at); err != nil {
			return err
		}
		if all[at].dir {
			return fmt.Errorf("%s is a directory: %w", at, errdefs.ErrFailedPrecondition)
		}
		rest := all[at].data[min(offset, info.Size):]
		if length >= 0 {
			rest = rest[:min(length, int64(len(rest)))]
		}
		data = io.NopCloser(bytes.NewReader(rest))
		return nil
	})
	return info, data, err
}

func (f *Sandboxes) WriteFile(_ context.Context, n sandbox.Name, p sandbox.Path, o sandbox.WriteOptions, data io.Reader) (info sandbox.FileInfo, created bool, err error) {
	text, err := io.ReadAll(data)
	if err != nil {
		return info, false, err
	}
	err = f.inFiles(n, p, func(all files, at string) (err error) {
		info, created, err = all.put(at, file{data: text, mode: 0o644, owner: p.User}, o.Mode)
		return err
	})
	return info, created, err
}

func (f *Sandboxes) MakeDirectory(_ context.Context, n sandbox.Name, p sandbox.Path, mode *uint32) (info sandbox.FileInfo, created bool, err error) {
	err = f.inFiles(n, p, func(all files, at string) (err error) {
		info, created, err = all.put(at, file{dir: true, mode: 0o755, owner: p.User}, mode)
		return err
	})
	return info, created, err
}

func (f *Sandboxes) MoveFile(_ context.Context, n sandbox.Name, from, to sandbox.Path) (info sandbox.FileInfo, err error) {
	err = f.inFiles(n, from, func(all files, at string) (err error) {
		if _, err := all.stat(at); err != nil {
			return err
		}
		all[absolute(to)] = all[at]
		delete(all, at)
		info, err = all.stat(absolute(to))
		return err
	})
	return info, err
}

func (f *Sandboxes) RemoveFile(_ context.Context, n sandbox.Name, p sandbox.Path, recursive bool) error {
	return f.inFiles(n, p, func(all files, at string) error {
		if _, err := all.stat(at); err != nil {
			return err
		}
		below := func(entry string, _ file) bool { return strings.HasPrefix(entry, at+"/") }
		before := len(all)
		rest := maps.Clone(all)
		if maps.DeleteFunc(rest, below); len(rest) < before && !recursive {
			return fmt.Errorf("%s is not empty: %w", at, errdefs.ErrFailedPrecondition)
		}
		maps.DeleteFunc(all, below)
		delete(all, at)
		return nil
	})
}

// WatchFiles returns a watch of Changes. It ends when that is closed.
func (f *Sandboxes) WatchFiles(ctx context.Context, n sandbox.Name, p sandbox.Path, o sandbox.WatchOptions) (w sandbox.Watch, err error) {
	err = f.inFiles(n, p, func(all files, at string) error {
		f.Recursive = o.Recursive
		w = watch{ctx, f.Changes}
		_, err := all.stat(at)
		return err
	})
	return w, err
}

type watch struct {
	ctx     context.Context
	changes <-chan sandbox.FileChange
}

func (w watch) Next() (sandbox.FileChange, error) {
	select {
	case change, ok := <-w.changes:
		if !ok {
			return change, io.EOF
		}
		return change, nil
	case <-w.ctx.Done():
		return sandbox.FileChange{}, fmt.Errorf("%w: %w", sandbox.ErrRunFailed, context.Cause(w.ctx))
	}
}

func (w watch) Close() error { return nil }
