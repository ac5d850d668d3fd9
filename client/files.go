package client

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"time"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/api/rpc"
)

const tarType = "application/x-tar"

// Files are the files of a sandbox. A relative path begins at the workdir of the sandbox, and "~" is the home directory of the
// user. If a file does not exist, the error is errdefs.ErrNotFound.
type Files struct{ sandbox *Sandbox }

// Files returns the files of the sandbox. It makes no request.
func (s *Sandbox) Files() Files { return Files{s} }

// FileReader reads a file of a sandbox. Its caller must close it.
type FileReader struct {
	io.ReadCloser
	// Size is in bytes. A file that was read to its end without an error has this size.
	Size       int64
	ModifiedAt time.Time
}

// Open opens a file for reading. Symbolic links are followed.
func (f Files) Open(ctx context.Context, path string) (*FileReader, error) {
	res, err := f.get(ctx, path, "")
	if err != nil {
		return nil, err
	}
	modified, _ := http.ParseTime(res.Header.Get("Last-Modified"))
	return &FileReader{ReadCloser: body{f.sandbox.client, ctx, res.Body}, Size: res.ContentLength, ModifiedAt: modified}, nil
}

// OpenTree opens a file or a directory as a tar archive. The caller must close it. The names in the archive are relative to the
// directory, which itself is called "."; a file has its own name.
func (f Files) OpenTree(ctx context.Context, path string) (io.ReadCloser, error) {
	res, err := f.get(ctx, path, tarType)
	if err != nil {
		return nil, err
	}
	return body{f.sandbox.client, ctx, res.Body}, nil
}

// Read returns the content of a file.
func (f Files) Read(ctx context.Context, path string) ([]byte, error) {
	r, err := f.Open(ctx, path)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

// WriteOptions say how a file is written.
type WriteOptions struct {
	// Mode has the permissions in octal, such as "0644". By default, they are those of the file that is replaced, or 0644.
	Mode string
	// User is the owner: a name or number, optionally followed by ":" and a group. The default is the user that the sandbox was
	// started with or, without one, the owner of the file that is replaced, or the user of the image.
	User string
}

// Write writes a file and creates missing directories. An existing file is replaced in one step when everything was written.
func (f Files) Write(ctx context.Context, path string, content io.Reader, o WriteOptions) (*rpc.FileInfo, error) {
	query := url.Values{}
	for name, value := range map[string]string{"mode": o.Mode, "user": o.User} {
		if value != "" {
			query.Set(name, value)
		}
	}
	var info rpc.FileInfo
	if err := f.put(ctx, path, query, "application/octet-stream", content, &info); err != nil {
		return nil, err
	}
	return &info, nil
}

// WriteTree extracts a tar archive into a directory, which it creates if necessary, and returns the number of entries. user is
// the owner of what is written, as in WriteOptions.
func (f Files) WriteTree(ctx context.Context, path string, archive io.Reader, user string) (entries int, err error) {
	query := url.Values{}
	if user != "" {
		query.Set("user", user)
	}
	var result struct {
		Entries int `json:"entries"`
	}
	err = f.put(ctx, path, query, tarType, archive, &result)
	return result.Entries, err
}

// get requests a file. accept is the media type to accept, or "" for any.
func (f Files) get(ctx context.Context, path, accept string) (*http.Response, error) {
	return withRetries(ctx, request{idempotent: true}, func() (*http.Response, error) {
		req, err := f.request(ctx, http.MethodGet, path, url.Values{}, nil)
		if err != nil {
			return nil, err
		}
		if accept != "" {
			req.Header.Set("Accept", accept)
		}
		return f.do(req)
	})
}

// put sends a body and decodes the response. The request is sent once, because the body cannot be read again.
func (f Files) put(ctx context.Context, path string, query url.Values, mediaType string, content io.Reader, into any) error {
	req, err := f.request(ctx, http.MethodPut, path, query, content)
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", mediaType)
	res, err := f.do(req)
	if err != nil {
		return err
	}
	r, err := f.sandbox.client.readResponse(ctx, res)
	if err != nil {
		return err
	}
	if json.Unmarshal(r.body, into) != nil {
		return r.unexpected()
	}
	return nil
}

func (f Files) request(ctx context.Context, method, path string, query url.Values, content io.Reader) (*http.Request, error) {
	if path == "" {
		return nil, errorf(errdefs.ErrInvalidArgument, "the path is empty")
	}
	query.Set("path", path)
	target, query, err := f.sandbox.path(rpc.FilesPath, query)
	if err != nil {
		return nil, err
	}
	req, err := f.sandbox.client.newRequest(ctx, method, target, content)
	if err != nil {
		return nil, err
	}
	req.URL.RawQuery = query.Encode()
	return req, f.sandbox.client.authorize(req)
}

// do sends a request once. Its response has a status of success.
func (f Files) do(req *http.Request) (*http.Response, error) {
	c := f.sandbox.client
	res, err := c.http().Do(req)
	if err != nil {
		return nil, c.explain(req.Context(), err)
	}
	if res.StatusCode/100 == 2 && res.Header.Get("X-Request-Id") != "" {
		return res, nil
	}
	r, err := c.readResponse(req.Context(), res)
	if err != nil {
		return nil, err
	}
	if _, err := r.result(); err != nil {
		return nil, err
	}
	return nil, r.unexpected()
}

// body is the body of a response with a file. Its errors say what to do.
type body struct {
	client *Client
	ctx    context.Context
	io.ReadCloser
}

func (b body) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	switch {
	case err == nil || err == io.EOF:
	case b.ctx.Err() != nil:
		err = contextError(b.ctx)
	default:
		err = errorf(errdefs.ErrUnavailable, "the transfer from %s broke off, because the file changed, the sandbox failed or the connection was lost: %w",
			b.client.serverURL(), err)
	}
	return n, err
}

// List returns the entries of a directory, sorted by name, each directory before its entries. depth is how many levels to list; 0
// means 1.
func (f Files) List(ctx context.Context, path string, depth int) ([]rpc.FileInfo, error) {
	res, err := post[rpc.FSListResult](ctx, f.sandbox.client, request{
		method: rpc.MethodFSList, params: rpc.FSListParams{FileTarget: f.target(path), Depth: depth}, timeout: queryTimeout, idempotent: true,
	})
	return res.Entries, err
}

// Stat describes a file. A symbolic link is not followed.
func (f Files) Stat(ctx context.Context, path string) (*rpc.FileInfo, error) {
	res, err := post[rpc.FileInfo](ctx, f.sandbox.client, request{
		method: rpc.MethodFSStat, params: rpc.FSStatParams{FileTarget: f.target(path)}, timeout: queryTimeout, idempotent: true,
	})
	if err != nil {
		return nil, err
	}
	return &res, nil
}

// Mkdir creates a directory and its missing parents. It succeeds if the directory exists.
func (f Files) Mkdir(ctx context.Context, path string, o WriteOptions) (*rpc.WrittenFile, error) {
	res, err := post[rpc.WrittenFile](ctx, f.sandbox.client, request{
		method:  rpc.MethodFSMkdir,
		params:  rpc.FSMkdirParams{FileTarget: f.target(path), FileOwner: rpc.FileOwner{Mode: o.Mode, User: o.User}},
		timeout: queryTimeout, idempotent: true,
	})
	if err != nil {
		return nil, err
	}
	return &res, nil
}

// Move renames a file or a directory. It replaces a file at the new path and creates missing directories.
func (f Files) Move(ctx context.Context, from, to string) (*rpc.FileInfo, error) {
	res, err := post[rpc.FileInfo](ctx, f.sandbox.client, request{
		method: rpc.MethodFSMove, params: rpc.FSMoveParams{Target: f.sandbox.target(), From: from, To: to}, timeout: stopTimeout,
	})
	if err != nil {
		return nil, err
	}
	return &res, nil
}

// Remove removes a file or an empty directory, or with recursive a directory with everything in it.
func (f Files) Remove(ctx context.Context, path string, recursive bool) error {
	_, err := post[rpc.Empty](ctx, f.sandbox.client, request{
		method: rpc.MethodFSRemove, params: rpc.FSRemoveParams{FileTarget: f.target(path), Recursive: recursive}, timeout: stopTimeout,
	})
	return err
}

func (f Files) target(path string) rpc.FileTarget {
	return rpc.FileTarget{Target: f.sandbox.target(), Path: path}
}

// Watch reports changes of a file, or of the files in a directory. It calls started when it watches, unless that is nil, and then
// changed for each change. It returns when ctx is done or one of the functions returns an error, and returns that error.
// recursive includes everything below the path.
func (f Files) Watch(ctx context.Context, path string, recursive bool, started func() error, changed func(rpc.FSChange) error) error {
	events, err := openStream(ctx, f.sandbox.client, request{
		method: rpc.MethodFSWatch, params: rpc.FSWatchParams{FileTarget: f.target(path), Recursive: recursive},
	})
	if err != nil {
		return err
	}
	defer events.Close()
	for {
		kind, data, err := events.next(new(rpc.Empty))
		if err == nil {
			switch kind {
			case rpc.EventStarted:
				if started != nil {
					err = started()
				}
			case rpc.EventChange:
				var change rpc.FSChange
				if err = events.decode(data, &change); err == nil {
					err = changed(change)
				}
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}
