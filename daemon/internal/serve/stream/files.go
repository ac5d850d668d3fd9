package stream

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"io"
	"mime"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	gateway "github.com/msbd/msbd/daemon/internal/serve/http"
	"github.com/msbd/msbd/daemon/internal/serve/wire"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

const tarType = "application/x-tar"

// getFile responds with the bytes of a file, or with a file or directory as a tar archive if the client accepts that.
func (s *service) getFile(c *gateway.Call, w http.ResponseWriter, r *http.Request) error {
	name, params, err := target(c, r, "path")
	if err != nil {
		return err
	}
	file, err := params.path()
	if err != nil {
		return err
	}
	if slices.Contains(gateway.Accepted(r.Header), tarType) {
		return s.getTree(c, w, r, name, file)
	}
	length := int64(-1)
	if r.Method == http.MethodHead || r.Header.Get("Range") != "" {
		length = 0 // where to read is not known yet
	}
	content := &content{ctx: r.Context(), call: c, header: w.Header(), open: func(offset, length int64) (sandbox.FileInfo, io.ReadCloser, error) {
		return s.sandboxes.ReadFile(r.Context(), name, file, offset, length)
	}}
	defer content.close()
	if err := content.openAt(0, length); errdefs.IsFailedPrecondition(err) {
		return s.explainDirectory(c, r.Context(), name, file, err)
	} else if err != nil {
		return err
	}
	if length == 0 {
		content.close()
	}
	if content.info.Size < 0 {
		return fmt.Errorf("the sandbox says that the file has %d bytes: %w", content.info.Size, sandbox.ErrRunFailed)
	}
	if strings.Contains(r.Header.Get("Range"), ",") {
		r.Header.Del("Range") // several ranges are optional in HTTP
	}
	modified := wire.Time(content.info.ModifiedAt)
	h := w.Header()
	h.Set("Content-Type", "application/octet-stream")
	h.Set("ETag", fmt.Sprintf(`"%x-%x"`, content.info.Size, modified.UnixNano()))
	setFilename(h, path.Base(file.Path))
	out := &bodyWriter{ResponseWriter: w}
	http.ServeContent(out, r, "", modified, content)
	switch {
	case content.err != nil:
		return content.err
	case out.err != nil:
		return out.err
	case out.status == http.StatusRequestedRangeNotSatisfiable:
		refusal := refuse(out.status, fmt.Sprintf("the file has %d bytes, of which none is in the requested range", content.info.Size))
		refusal.Header = http.Header{"Content-Range": h["Content-Range"]}
		return refusal
	case out.status == http.StatusPreconditionFailed:
		return refuse(out.status, "the file has changed, or was not changed, contrary to a condition in the headers of the request")
	}
	return nil
}

// explainDirectory returns the error for a file that cannot be read because of err.
func (s *service) explainDirectory(c *gateway.Call, ctx context.Context, name sandbox.Name, file sandbox.Path, err error) error {
	var info sandbox.FileInfo
	var statErr error
	c.Wait(func() { info, statErr = s.sandboxes.StatFile(ctx, name, file, false) })
	if info.Target != nil {
		info = *info.Target
	}
	if statErr != nil || info.Type != sandbox.Directory {
		return err
	}
	return fmt.Errorf("%q is a directory; send the header Accept: %s to get it as an archive: %w", bounded.Short(file.Path), tarType, errdefs.ErrFailedPrecondition)
}

// getTree responds with a file or directory as a tar archive.
func (s *service) getTree(c *gateway.Call, w http.ResponseWriter, r *http.Request, name sandbox.Name, file sandbox.Path) (err error) {
	var archive io.ReadCloser
	c.Wait(func() { archive, err = s.sandboxes.ReadTree(r.Context(), name, file) })
	if err != nil {
		return err
	}
	defer archive.Close()
	in := bufio.NewReaderSize(waitingReader{c, archive}, 64<<10)
	if _, err := in.Peek(1); err == io.EOF {
		return errIncomplete
	} else if err != nil { // for example, there is no such file
		return err
	}
	w.Header().Set("Content-Type", tarType)
	setFilename(w.Header(), path.Base(file.Path)+".tar")
	if err := http.NewResponseController(w).Flush(); err != nil || r.Method == http.MethodHead {
		return err
	}
	_, err = io.Copy(w, in)
	return err
}

// putFile writes the body to a file, or extracts it into a directory if it is a tar archive.
func (s *service) putFile(c *gateway.Call, w http.ResponseWriter, r *http.Request) error {
	if encoding := r.Header.Get("Content-Encoding"); encoding != "" && !strings.EqualFold(encoding, "identity") {
		return refuse(http.StatusUnsupportedMediaType, "the body has a Content-Encoding; send the bytes of the file as they are")
	}
	if err := checkUnconditional(r); err != nil {
		return err
	}
	if r.Header.Get("Content-Range") != "" {
		return refuse(http.StatusBadRequest, "Content-Range is not supported; to write into an existing file, use the parameter offset")
	}
	if mediaType, _, _ := mime.ParseMediaType(r.Header.Get("Content-Type")); mediaType == tarType {
		return s.putTree(c, w, r)
	}
	name, params, err := target(c, r, "path", "user", "mode", "offset")
	if err != nil {
		return err
	}
	file, err := params.path()
	if err != nil {
		return err
	}
	var options sandbox.WriteOptions
	if text, ok := params.get("mode"); ok {
		if options.Mode, err = wire.Mode(text); err != nil {
			return err
		}
	}
	if text, ok := params.get("offset"); ok {
		offset, err := strconv.ParseUint(text, 10, 63)
		if err != nil {
			return fmt.Errorf("offset %q: give a number of bytes: %w", bounded.Short(text), errdefs.ErrInvalidArgument)
		}
		options.Offset = new(int64(offset))
	}
	if r.ContentLength == 0 && r.ProtoMajor == 1 && r.Header.Get("Content-Length") == "" {
		return refuse(http.StatusLengthRequired, "the request has no body; send the file with a Content-Length or in chunks")
	}
	options.Length = max(0, r.ContentLength)
	body := &upload{Reader: r.Body}
	var info sandbox.FileInfo
	var created bool
	c.Wait(func() { info, created, err = s.sandboxes.WriteFile(r.Context(), name, file, options, body) })
	if err := cmp.Or(body.err, err); err != nil {
		return err
	}
	if created {
		w.WriteHeader(http.StatusCreated)
	}
	return writeJSON(w, wire.FileInfo(info))
}

// checkUnconditional refuses conditions for changes, which would not be checked in the same step as the change.
func checkUnconditional(r *http.Request) error {
	for _, name := range []string{"If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since"} {
		if r.Header.Get(name) != "" {
			return refuse(http.StatusBadRequest, name+" is supported only to read files")
		}
	}
	return nil
}

// putTree extracts the body, a tar archive, into a directory.
func (s *service) putTree(c *gateway.Call, w http.ResponseWriter, r *http.Request) error {
	name, params, err := target(c, r, "path", "user", "keep_owners")
	if err != nil {
		return err
	}
	directory, err := params.path()
	if err != nil {
		return err
	}
	keepOwners, err := params.flag("keep_owners")
	if err != nil {
		return err
	}
	body := &upload{Reader: r.Body}
	var result struct {
		Entries uint64 `json:"entries"`
	}
	c.Wait(func() {
		result.Entries, err = s.sandboxes.WriteTree(r.Context(), name, directory, keepOwners, body)
	})
	if err := cmp.Or(body.err, err); err != nil {
		return err
	}
	return writeJSON(w, result)
}

// deleteFile removes a file or directory.
func (s *service) deleteFile(c *gateway.Call, w http.ResponseWriter, r *http.Request) error {
	if err := checkUnconditional(r); err != nil {
		return err
	}
	name, params, err := target(c, r, "path", "recursive")
	if err != nil {
		return err
	}
	file, err := params.path()
	if err != nil {
		return err
	}
	recursive, err := params.flag("recursive")
	if err != nil {
		return err
	}
	c.Wait(func() { err = s.sandboxes.RemoveFile(r.Context(), name, file, recursive) })
	if err != nil {
		return err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil
}

// path returns the parameters path, which is required, and user.
func (p parameters) path() (sandbox.Path, error) {
	file, _ := p.get("path")
	if file == "" {
		return sandbox.Path{}, fmt.Errorf("the parameter path is missing: %w", errdefs.ErrInvalidArgument)
	}
	user, _ := p.get("user")
	return sandbox.Path{Path: file, User: user}, nil
}

// setFilename sets the name under which browsers and other clients save the response.
func setFilename(h http.Header, name string) {
	h.Set("Content-Disposition", mime.FormatMediaType("attachment", map[string]string{"filename": strings.ToValidUTF8(name, "\uFFFD")}))
}

// refuse returns an error that determines the HTTP status.
func refuse(status int, message string) *gateway.Refusal {
	e := &rpc.Error{Code: rpc.CodeInvalidRequest, Message: message}
	return &gateway.Refusal{Status: status, ClientError: e, Cause: e}
}

func writeJSON(w io.Writer, value any) error {
	return json.MarshalWrite(w, value, jsontext.AllowInvalidUTF8(true))
}

// content is a file in a sandbox as http.ServeContent reads it. The file is opened where ServeContent reads.
type content struct {
	ctx  context.Context // of the request
	call *gateway.Call
	// header is that of the response. ServeContent sets its Content-Length before it reads.
	header http.Header
	open   func(offset, length int64) (sandbox.FileInfo, io.ReadCloser, error)
	info   sandbox.FileInfo // of the first open
	at     int64            // where the next Read begins
	data   io.ReadCloser    // nil if the file is not open
	// dataAt is where data is.
	dataAt int64
	err    error // the error of Read, unless it is io.EOF
}

// openAt opens the file at an offset.
func (f *content) openAt(offset, length int64) (err error) {
	f.close()
	f.dataAt = offset
	f.call.Wait(func() { f.info, f.data, err = f.open(offset, length) })
	return err
}

func (f *content) close() {
	if f.data != nil {
		f.call.Wait(func() { f.data.Close() })
		f.data = nil
	}
}

// Seek implements io.Seeker. Its offset is never invalid, because ServeContent checks ranges.
func (f *content) Seek(offset int64, from int) (int64, error) {
	if from == io.SeekEnd {
		offset += f.info.Size
	}
	f.at = offset
	return f.at, nil
}

// Read implements io.Reader. It returns as many bytes as info.Size says, or an error before the last of them.
func (f *content) Read(p []byte) (n int, err error) {
	if f.at >= f.info.Size {
		return 0, io.EOF
	}
	if n, f.err = f.read(p); f.err != nil {
		return 0, f.err
	}
	return n, nil
}

func (f *content) read(p []byte) (n int, err error) {
	remaining := f.info.Size - f.at
	if f.at != f.dataAt || f.data == nil {
		before := f.info
		wanted := remaining
		if n, err := strconv.ParseInt(f.header.Get("Content-Length"), 10, 64); err == nil {
			wanted = min(wanted, n) // only what the client requested
		}
		if err := f.openAt(f.at, wanted); err != nil {
			return 0, err
		}
		if f.info.Size != before.Size || !f.info.ModifiedAt.Equal(before.ModifiedAt) {
			return 0, errChanged
		}
	}
	if err := context.Cause(f.ctx); err != nil {
		return 0, err
	}
	data := waitingReader{f.call, f.data}
	n, err = data.Read(p[:min(int64(len(p)), remaining)])
	f.at += int64(n)
	f.dataAt = f.at
	if f.at < f.info.Size && err == io.EOF {
		return 0, errIncomplete
	} else if f.at < f.info.Size {
		return n, err
	}
	// Check before the last bytes are sent, so that the client notices.
	if more, err := io.ReadFull(data, make([]byte, 1)); more > 0 {
		return 0, errChanged
	} else if err != io.EOF {
		return 0, err
	}
	return n, nil
}

var (
	errChanged    = fmt.Errorf("the file changed while it was read: %w", sandbox.ErrRunFailed)
	errIncomplete = fmt.Errorf("the sandbox sent too few bytes: %w", sandbox.ErrRunFailed)
)

// waitingReader is a reader from a sandbox. Other requests of the key may work while it waits.
type waitingReader struct {
	call *gateway.Call
	io.Reader
}

func (r waitingReader) Read(p []byte) (n int, err error) {
	r.call.Wait(func() { n, err = r.Reader.Read(p) })
	return n, err
}

// bodyWriter is the ResponseWriter for http.ServeContent. A successful response is sent as it is written. The body of
// another one is discarded.
type bodyWriter struct {
	http.ResponseWriter
	status int
	err    error // of the client
}

func (w *bodyWriter) WriteHeader(status int) {
	w.status = status
	w.ResponseWriter.WriteHeader(status)
	if status == http.StatusOK || status == http.StatusPartialContent {
		w.err = http.NewResponseController(w.ResponseWriter).Flush()
	}
}

func (w *bodyWriter) Write(p []byte) (n int, err error) {
	if w.status >= http.StatusBadRequest {
		return len(p), nil
	}
	n, w.err = w.ResponseWriter.Write(p)
	return n, w.err
}

// upload is the body of a request. It keeps its error, because that is the reason why the sandbox refuses the rest.
type upload struct {
	io.Reader
	err error
}

func (u *upload) Read(p []byte) (n int, err error) {
	if n, err = u.Reader.Read(p); err != io.EOF {
		u.err = err
	}
	return n, err
}
