package rpc

import (
	"bytes"
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"math"
	"unicode/utf8"

	"github.com/containerd/errdefs"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/serve/wire"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// Files is the part of Sandboxes for files, as in sandbox.Files.
type Files interface {
	StatFile(ctx context.Context, n sandbox.Name, path sandbox.Path, xattrs bool) (sandbox.FileInfo, error)
	ListFiles(ctx context.Context, n sandbox.Name, path sandbox.Path, depth int, each func(sandbox.FileInfo) error) error
	ReadFile(ctx context.Context, n sandbox.Name, path sandbox.Path, offset, length int64) (sandbox.FileInfo, io.ReadCloser, error)
	WriteFile(ctx context.Context, n sandbox.Name, path sandbox.Path, o sandbox.WriteOptions, data io.Reader) (info sandbox.FileInfo, created bool, err error)
	MakeDirectory(ctx context.Context, n sandbox.Name, path sandbox.Path, mode *uint32) (info sandbox.FileInfo, created bool, err error)
	MoveFile(ctx context.Context, n sandbox.Name, from, to sandbox.Path) (sandbox.FileInfo, error)
	RemoveFile(ctx context.Context, n sandbox.Name, path sandbox.Path, recursive bool) error
	WatchFiles(context.Context, sandbox.Name, sandbox.Path, sandbox.WatchOptions) (sandbox.Watch, error)
}

// parseFile returns the sandbox and the path that a request names.
func parseFile(namespace string, p rpc.FileTarget) (sandbox.Name, sandbox.Path, error) {
	path, err := parsePath("path", p.Path)
	return sandbox.Name{Namespace: namespace, Name: p.Sandbox}, path, err
}

// parsePath converts the path in the param with this name.
func parsePath(name, path string) (sandbox.Path, error) {
	if path == "" {
		return sandbox.Path{}, fmt.Errorf("%s is empty: %w", name, errdefs.ErrInvalidArgument)
	}
	return sandbox.Path{Path: path}, nil
}

// parseOwner converts the permissions and the owner of new files. The user is added to path.
func parseOwner(o rpc.FileOwner, path *sandbox.Path) (mode *uint32, err error) {
	path.User = o.User
	if o.Mode == "" {
		return nil, nil
	}
	return wire.Mode(o.Mode)
}

func (s *Service) readFile(ctx context.Context, c *call, namespace string, p rpc.FSReadParams) (rpc.FSReadResult, error) {
	n, path, err := parseFile(namespace, p.FileTarget)
	if err != nil {
		return rpc.FSReadResult{}, err
	}
	if err := checkEncoding(p.Encoding); err != nil {
		return rpc.FSReadResult{}, err
	}
	length := math.MaxInt
	if p.Length != nil {
		length = *p.Length
	}
	if p.Offset < 0 || length < 0 {
		return rpc.FSReadResult{}, fmt.Errorf("offset and length must not be negative: %w", errdefs.ErrInvalidArgument)
	}
	var info sandbox.FileInfo
	var data io.ReadCloser
	c.wait(func() {
		info, data, err = s.sandboxes.ReadFile(ctx, n, path, int64(p.Offset), int64(min(length, rpc.MaxReadFile+1)))
	})
	if err != nil {
		return rpc.FSReadResult{}, err
	}
	defer c.wait(func() { _ = data.Close() })
	content, err := io.ReadAll(io.LimitReader(&heldReader{data, c, p.Encoding}, rpc.MaxReadFile+1))
	if err != nil {
		return rpc.FSReadResult{}, err
	}
	if len(content) > rpc.MaxReadFile {
		return rpc.FSReadResult{}, fmt.Errorf("%q has more than the %d MiB that this method returns; read a part of it with offset and length, "+
			"or download it with GET %s: %w", bounded.Short(p.Path), rpc.MaxReadFile>>20, rpc.FilesPath, errdefs.ErrFailedPrecondition)
	}
	res := rpc.FSReadResult{Encoding: rpc.EncodingUTF8, Size: int(max(0, info.Size))}
	switch {
	case p.Encoding == rpc.EncodingBase64:
		res.Encoding, res.Content = rpc.EncodingBase64, base64.StdEncoding.EncodeToString(content)
	case utf8.Valid(content):
		res.Content = string(content)
	default:
		return rpc.FSReadResult{}, fmt.Errorf("%q is not valid UTF-8; read it with the encoding base64: %w", bounded.Short(p.Path), errdefs.ErrFailedPrecondition)
	}
	return res, nil
}

// heldReader reads the content of a file that a call returns, and counts its size in the response.
type heldReader struct {
	io.Reader
	call     *call
	encoding rpc.Encoding
}

func (r *heldReader) Read(p []byte) (n int, err error) {
	r.call.wait(func() { n, err = r.Reader.Read(p) })
	size := base64.StdEncoding.EncodedLen(n)
	if r.encoding != rpc.EncodingBase64 {
		size = jsonSize(p[:n])
	}
	if held := r.call.holdResult(size); held != nil {
		return 0, held
	}
	return n, err
}

// holdResult counts bytes of a result other than the output of a run, as Call.Hold does.
func (c *call) holdResult(bytes int) error {
	if c.Hold(bytes) == nil {
		return nil
	}
	return &rpc.Error{Code: rpc.CodeExhausted, Message: "the pending responses take too much memory: request less data, or send fewer requests at a time"}
}

func (s *Service) writeFile(ctx context.Context, c *call, namespace string, p rpc.FSWriteParams) (rpc.WrittenFile, error) {
	n, path, err := parseFile(namespace, p.FileTarget)
	if err != nil {
		return rpc.WrittenFile{}, err
	}
	mode, err := parseOwner(p.FileOwner, &path)
	if err != nil {
		return rpc.WrittenFile{}, err
	}
	content, err := decodeText("content", p.Content, p.Encoding)
	if err != nil {
		return rpc.WrittenFile{}, err
	}
	var info sandbox.FileInfo
	var created bool
	c.wait(func() {
		info, created, err = s.sandboxes.WriteFile(ctx, n, path, sandbox.WriteOptions{Mode: mode}, bytes.NewReader(content))
	})
	return rpc.WrittenFile{FileInfo: wire.FileInfo(info), Created: created}, err
}

func (s *Service) listFiles(ctx context.Context, c *call, namespace string, p rpc.FSListParams) (rpc.FSListResult, error) {
	n, path, err := parseFile(namespace, p.FileTarget)
	if err != nil {
		return rpc.FSListResult{}, err
	}
	if p.Depth < 0 || p.Depth > math.MaxInt32 {
		return rpc.FSListResult{}, fmt.Errorf("depth %d: give a number of levels from 1: %w", p.Depth, errdefs.ErrInvalidArgument)
	}
	res := rpc.FSListResult{Entries: []rpc.FileInfo{}}
	c.wait(func() {
		err = s.sandboxes.ListFiles(ctx, n, path, max(1, p.Depth), func(f sandbox.FileInfo) error {
			if len(res.Entries) == rpc.MaxListFiles {
				return fmt.Errorf("%q has more than %d entries; list a smaller directory, or fewer levels: %w",
					bounded.Short(p.Path), rpc.MaxListFiles, errdefs.ErrFailedPrecondition)
			}
			info := wire.FileInfo(f)
			res.Entries = append(res.Entries, info)
			return c.holdResult(fileSize(info))
		})
	})
	return res, err
}

// fileSize returns about how many bytes the description of a file takes in a response.
func fileSize(f rpc.FileInfo) int {
	size := statSize(f.FileStat) + jsonSize([]byte(f.LinkTarget))
	if f.Target != nil {
		size += statSize(*f.Target)
	}
	return size
}

func statSize(f rpc.FileStat) int {
	const others = 256 // the other members, and the names of the members
	return others + jsonSize([]byte(f.Path)) + base64.StdEncoding.EncodedLen(len(f.PathBase64)) + len(f.User) + len(f.Group)
}

func (s *Service) statFile(ctx context.Context, c *call, namespace string, p rpc.FSStatParams) (rpc.FileInfo, error) {
	n, path, err := parseFile(namespace, p.FileTarget)
	if err != nil {
		return rpc.FileInfo{}, err
	}
	var info sandbox.FileInfo
	c.wait(func() { info, err = s.sandboxes.StatFile(ctx, n, path, false) })
	return wire.FileInfo(info), err
}

func (s *Service) fileExists(ctx context.Context, c *call, namespace string, p rpc.FSExistsParams) (rpc.FSExistsResult, error) {
	n, path, err := parseFile(namespace, p.FileTarget)
	if err != nil {
		return rpc.FSExistsResult{}, err
	}
	c.wait(func() { _, err = s.sandboxes.StatFile(ctx, n, path, false) })
	if errdefs.IsNotFound(err) {
		if _, err := s.sandboxes.Get(n); err != nil { // the sandbox does not exist
			return rpc.FSExistsResult{}, err
		}
		return rpc.FSExistsResult{}, nil
	}
	return rpc.FSExistsResult{Exists: err == nil}, err
}

func (s *Service) makeDirectory(ctx context.Context, c *call, namespace string, p rpc.FSMkdirParams) (rpc.WrittenFile, error) {
	n, path, err := parseFile(namespace, p.FileTarget)
	if err != nil {
		return rpc.WrittenFile{}, err
	}
	mode, err := parseOwner(p.FileOwner, &path)
	if err != nil {
		return rpc.WrittenFile{}, err
	}
	var info sandbox.FileInfo
	var created bool
	c.wait(func() { info, created, err = s.sandboxes.MakeDirectory(ctx, n, path, mode) })
	return rpc.WrittenFile{FileInfo: wire.FileInfo(info), Created: created}, err
}

func (s *Service) moveFile(ctx context.Context, c *call, namespace string, p rpc.FSMoveParams) (rpc.FileInfo, error) {
	from, err := parsePath("from", p.From)
	if err != nil {
		return rpc.FileInfo{}, err
	}
	to, err := parsePath("to", p.To)
	if err != nil {
		return rpc.FileInfo{}, err
	}
	var info sandbox.FileInfo
	c.wait(func() {
		info, err = s.sandboxes.MoveFile(ctx, sandbox.Name{Namespace: namespace, Name: p.Sandbox}, from, to)
	})
	return wire.FileInfo(info), err
}

func (s *Service) removeFile(ctx context.Context, c *call, namespace string, p rpc.FSRemoveParams) (none rpc.Empty, err error) {
	n, path, err := parseFile(namespace, p.FileTarget)
	if err != nil {
		return none, err
	}
	c.wait(func() { err = s.sandboxes.RemoveFile(ctx, n, path, p.Recursive) })
	return none, err
}

func (s *Service) watchFiles(ctx context.Context, c *call, namespace string, p rpc.FSWatchParams) (none rpc.Empty, err error) {
	n, path, err := parseFile(namespace, p.FileTarget)
	if err != nil {
		return none, err
	}
	var w sandbox.Watch
	c.wait(func() { w, err = s.sandboxes.WatchFiles(ctx, n, path, sandbox.WatchOptions{Recursive: p.Recursive}) })
	if err != nil {
		return none, err
	}
	defer c.wait(func() { _ = w.Close() })
	if err := c.events.send(rpc.EventStarted, none); err != nil {
		return none, err
	}
	for {
		var change sandbox.FileChange
		c.wait(func() { change, err = w.Next() })
		if err == io.EOF {
			return none, nil
		}
		if err != nil {
			return none, err
		}
		if err := c.events.send(rpc.EventChange, wire.FileChange(change)); err != nil {
			return none, err
		}
	}
}
