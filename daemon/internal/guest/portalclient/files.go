package portalclient

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

func filePath(p sandbox.Path) *portalv1.FilePath {
	return &portalv1.FilePath{Path: []byte(p.Path), Workdir: p.Workdir, User: p.User}
}

var fileTypes = map[portalv1.FileType]sandbox.FileType{
	portalv1.FileType_FILE_TYPE_REGULAR:   sandbox.RegularFile,
	portalv1.FileType_FILE_TYPE_DIRECTORY: sandbox.Directory,
	portalv1.FileType_FILE_TYPE_SYMLINK:   sandbox.Symlink,
}

// maxMode has all permission bits, with setuid, setgid and sticky.
const maxMode = 0o7777

func fileInfo(i *portalv1.FileInfo) sandbox.FileInfo {
	info := sandbox.FileInfo{
		Path: string(i.GetPath()), Type: sandbox.OtherFile, Size: max(0, i.GetSize()), Mode: i.GetMode() & maxMode, UID: i.GetUid(), GID: i.GetGid(),
		User: i.GetUser(), Group: i.GetGroup(), ModifiedAt: i.GetModifiedAt().AsTime(), LinkTarget: string(i.GetLinkTarget()), Xattrs: i.GetXattrs(),
	}
	if t, ok := fileTypes[i.GetType()]; ok {
		info.Type = t
	}
	if target := i.GetTarget(); target != nil {
		target.Target = nil // there is only one, whatever the sandbox sends
		info.Target = new(fileInfo(target))
	}
	return info
}

// StatFile implements sandbox.Files.
func (c *Client) StatFile(ctx context.Context, path sandbox.Path, xattrs bool) (sandbox.FileInfo, error) {
	res, err := call[portalv1.StatFileResponse](ctx, c, processes, portalv1.FileService_StatFile_FullMethodName,
		&portalv1.StatFileRequest{File: filePath(path), Xattrs: xattrs})
	return fileInfo(res.GetInfo()), err
}

// ListFiles implements sandbox.Files.
func (c *Client) ListFiles(ctx context.Context, path sandbox.Path, depth int, each func(sandbox.FileInfo) error) error {
	stream, err := receive(ctx, c, c.files.ListFiles, &portalv1.ListFilesRequest{Directory: filePath(path), Depth: uint32(depth)})
	if err != nil {
		return err
	}
	defer stream.cancel()
	for {
		res, err := stream.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return callError(stream.ctx, err)
		}
		if err := each(fileInfo(res.GetInfo())); err != nil {
			return err
		}
	}
}

// ReadFile implements sandbox.Files.
func (c *Client) ReadFile(ctx context.Context, path sandbox.Path, offset, length int64) (sandbox.FileInfo, io.ReadCloser, error) {
	req := &portalv1.ReadFileRequest{File: filePath(path), Offset: offset}
	if length >= 0 {
		req.Length = &length
	}
	req.Transfer = c.newTransfer()
	res, data, err := c.readFile(ctx, req)
	if req.Transfer != "" && res.GetTransfer() == nil {
		c.endTransfer()
	}
	if err != nil {
		return sandbox.FileInfo{}, nil, err
	}
	return fileInfo(res.GetInfo()), data, nil
}

// readFile returns the first response and the bytes of the file. If the response offers the requested transfer, the bytes end it.
func (c *Client) readFile(ctx context.Context, req *portalv1.ReadFileRequest) (*portalv1.ReadFileResponse, io.ReadCloser, error) {
	stream, err := receive(ctx, c, c.files.ReadFile, req)
	if err != nil {
		return nil, nil, err
	}
	res, err := stream.first()
	if err != nil {
		return nil, nil, err
	}
	data := stream.reader((*portalv1.ReadFileResponse).GetData)
	if offer := res.GetTransfer(); offer != nil && req.Transfer != "" {
		return res, c.openTransfer(req.Transfer, offer.GetLength(), data), nil
	}
	return res, data, nil
}

// WriteFile implements sandbox.Files.
func (c *Client) WriteFile(ctx context.Context, path sandbox.Path, o sandbox.WriteOptions, data io.Reader) (sandbox.FileInfo, bool, error) {
	start := &portalv1.WriteFileRequest_Start{File: filePath(path), Mode: o.Mode, Offset: o.Offset, Xattrs: o.Xattrs}
	if o.Length >= minUpload && c.contract.Load() >= uploads {
		start.Length = o.Length
		if start.Transfer = c.newTransfer(); start.Transfer != "" {
			defer c.endTransfer()
			data = &announced{data, o.Length}
		}
	}
	res, err := send(ctx, c, c.files.WriteFile, data,
		&portalv1.WriteFileRequest{Part: &portalv1.WriteFileRequest_Start_{Start: start}}, start.Transfer,
		func(piece []byte) *portalv1.WriteFileRequest {
			return &portalv1.WriteFileRequest{Part: &portalv1.WriteFileRequest_Data{Data: piece}}
		}, nil)
	return fileInfo(res.GetInfo()), res.GetCreated(), err
}

// MakeDirectory implements sandbox.Files.
func (c *Client) MakeDirectory(ctx context.Context, path sandbox.Path, mode *uint32) (sandbox.FileInfo, bool, error) {
	res, err := call[portalv1.MakeDirectoryResponse](ctx, c, processes, portalv1.FileService_MakeDirectory_FullMethodName,
		&portalv1.MakeDirectoryRequest{Directory: filePath(path), Mode: mode})
	return fileInfo(res.GetInfo()), res.GetCreated(), err
}

// MoveFile implements sandbox.Files.
func (c *Client) MoveFile(ctx context.Context, from, to sandbox.Path) (sandbox.FileInfo, error) {
	res, err := call[portalv1.MoveFileResponse](ctx, c, processes, portalv1.FileService_MoveFile_FullMethodName,
		&portalv1.MoveFileRequest{Source: filePath(from), Destination: filePath(to)})
	return fileInfo(res.GetInfo()), err
}

// RemoveFile implements sandbox.Files.
func (c *Client) RemoveFile(ctx context.Context, path sandbox.Path, recursive bool) error {
	_, err := call[portalv1.RemoveFileResponse](ctx, c, processes, portalv1.FileService_RemoveFile_FullMethodName,
		&portalv1.RemoveFileRequest{File: filePath(path), Recursive: recursive})
	return err
}

// ReadTree implements sandbox.Files.
func (c *Client) ReadTree(ctx context.Context, path sandbox.Path) (io.ReadCloser, error) {
	stream, err := receive(ctx, c, c.files.ReadTree, &portalv1.ReadTreeRequest{Root: filePath(path)})
	if err != nil {
		return nil, err
	}
	res, err := stream.first() // an archive is never empty
	if err != nil {
		return nil, err
	}
	archive := stream.reader((*portalv1.ReadTreeResponse).GetData)
	archive.data = res.GetData()
	return archive, nil
}

// WriteTree implements sandbox.Files.
func (c *Client) WriteTree(ctx context.Context, path sandbox.Path, keepOwners bool, archive io.Reader) (uint64, error) {
	start := &portalv1.WriteTreeRequest_Start{Directory: filePath(path), KeepOwners: keepOwners}
	res, err := send(ctx, c, c.files.WriteTree, archive,
		&portalv1.WriteTreeRequest{Part: &portalv1.WriteTreeRequest_Start_{Start: start}}, "",
		func(piece []byte) *portalv1.WriteTreeRequest {
			return &portalv1.WriteTreeRequest{Part: &portalv1.WriteTreeRequest_Data{Data: piece}}
		}, nil)
	return res.GetEntries(), err
}

// WatchFiles implements sandbox.Files.
func (c *Client) WatchFiles(ctx context.Context, path sandbox.Path, o sandbox.WatchOptions) (sandbox.Watch, error) {
	stream, err := receive(ctx, c, c.files.WatchFiles,
		&portalv1.WatchFilesRequest{Path: filePath(path), Recursive: o.Recursive, Infos: o.Infos})
	if err != nil {
		return nil, err
	}
	if _, err := stream.first(); err != nil {
		return nil, err
	}
	return &watch{stream}, nil
}

// watch implements sandbox.Watch.
type watch struct {
	stream *responses[portalv1.WatchFilesResponse]
}

var changeTypes = map[portalv1.WatchFilesResponse_Type]sandbox.ChangeType{
	portalv1.WatchFilesResponse_TYPE_CREATE:   sandbox.FileCreated,
	portalv1.WatchFilesResponse_TYPE_WRITE:    sandbox.FileWritten,
	portalv1.WatchFilesResponse_TYPE_REMOVE:   sandbox.FileRemoved,
	portalv1.WatchFilesResponse_TYPE_RENAME:   sandbox.FileRenamed,
	portalv1.WatchFilesResponse_TYPE_CHMOD:    sandbox.FileChmodded,
	portalv1.WatchFilesResponse_TYPE_OVERFLOW: sandbox.ChangesLost,
}

// Next implements sandbox.Watch.
func (w *watch) Next() (sandbox.FileChange, error) {
	res, err := w.stream.Recv()
	if err == io.EOF {
		return sandbox.FileChange{}, classified{"the sandbox ended the watch", sandbox.ErrRunFailed}
	}
	if err != nil {
		return sandbox.FileChange{}, callError(w.stream.ctx, err)
	}
	change := sandbox.FileChange{Type: changeTypes[res.GetType()], Path: string(res.GetPath())}
	if change.Type == "" {
		return sandbox.FileChange{}, classified{"the sandbox reported a change of an unknown type", sandbox.ErrRunFailed}
	}
	if info := res.GetInfo(); info != nil {
		change.Info = new(fileInfo(info))
	}
	return change, nil
}

// Close implements sandbox.Watch.
func (w *watch) Close() error {
	w.stream.cancel()
	return nil
}

// Dial implements sandbox.Portal.
func (c *Client) Dial(ctx context.Context, address sandbox.Address) (sandbox.Conn, error) {
	if err := c.checkContract(processes); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	stream, err := c.files.Dial(ctx)
	if err != nil {
		err = connectionError(ctx, err)
		cancel()
		return nil, err
	}
	req := &portalv1.DialRequest{Part: &portalv1.DialRequest_TcpPort{TcpPort: uint32(address.Port)}}
	if address.Port == 0 {
		req = &portalv1.DialRequest{Part: &portalv1.DialRequest_UnixPath{UnixPath: address.Unix}}
	}
	_ = stream.Send(req) // if it fails, the reason is the error of Recv
	if _, err := stream.Recv(); err != nil {
		err = callError(ctx, err)
		cancel()
		return nil, err
	}
	next := func() ([]byte, error) {
		res, err := stream.Recv()
		if res.GetEnd() {
			err = io.EOF
		}
		return res.GetData(), err
	}
	return &dialed{receiver{ctx: ctx, cancel: cancel, next: next}, stream}, nil
}

// dialed is a connection of Dial.
type dialed struct {
	receiver
	stream grpc.BidiStreamingClient[portalv1.DialRequest, portalv1.DialResponse]
}

// errClosed is returned for data that the program in the sandbox no longer accepts.
var errClosed = errors.New("the connection was closed")

// Write implements io.Writer.
func (d *dialed) Write(p []byte) (n int, err error) {
	for len(p) > 0 {
		piece := p[:min(len(p), pieceSize)]
		if d.stream.Send(&portalv1.DialRequest{Part: &portalv1.DialRequest_Data{Data: piece}}) != nil {
			return n, errClosed
		}
		n += len(piece)
		p = p[len(piece):]
	}
	return n, nil
}

// CloseWrite implements sandbox.Conn.
func (d *dialed) CloseWrite() error { return d.stream.CloseSend() }
