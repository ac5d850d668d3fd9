package portal

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// maxGenerated limits the files whose content the kernel generates, in bytes.
const maxGenerated = 1 << 20

// isGenerated reports whether the kernel generates the content of an open file or directory when it is read, as in /proc
// and /sys. The size of such a file is unknown until it has been read.
func isGenerated(f *os.File) bool {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return false
	}
	switch fs.Type {
	case unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC, unix.DEBUGFS_MAGIC,
		unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC, unix.BPF_FS_MAGIC:
		return true
	}
	return false
}

// ReadFile implements portalv1.FileServiceServer.
func (s *fileServer) ReadFile(req *portalv1.ReadFileRequest, stream grpc.ServerStreamingServer[portalv1.ReadFileResponse]) error {
	loc, err := locate(req.GetFile())
	if err != nil {
		return err
	}
	offset, length := req.GetOffset(), req.GetLength()
	if offset < 0 || length < 0 {
		return status.Error(codes.InvalidArgument, "offset or length is negative: use 0 or more")
	}
	// Opening a pipe must not wait for a writer.
	f, err := os.OpenFile(loc.path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return fileError(loc.path, err)
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fileError(loc.path, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return notRegular(loc.path, st.Mode)
	}
	var content io.ReaderAt = f
	if isGenerated(f) {
		m := &memory{budget: s.memory}
		defer m.close()
		text, err := readGenerated(f, m)
		if err != nil {
			return fileError(loc.path, err)
		}
		st.Size, content = int64(len(text)), strings.NewReader(text)
	}

	rest := max(st.Size-offset, 0)
	if req.Length != nil {
		rest = min(rest, length)
	}
	first := &portalv1.ReadFileResponse{Part: &portalv1.ReadFileResponse_Info{Info: newNameTable().info(loc.path, &st)}}
	if req.GetTransfer() != "" && content == f && rest >= minTransfer {
		first.Transfer = &portalv1.Transfer{Length: rest}
		sent, err := s.transfers.send(stream.Context(), req.GetTransfer(), func() error { return stream.Send(first) }, f, offset, rest)
		if err == io.ErrUnexpectedEOF {
			err = changed(loc.path)
		}
		if sent || err != nil {
			return fileError(loc.path, err)
		}
	} else if err := stream.Send(first); err != nil {
		return err
	}
	n, err := io.CopyBuffer(pieces(func(data []byte) error {
		return stream.Send(&portalv1.ReadFileResponse{Part: &portalv1.ReadFileResponse_Data{Data: data}})
	}), io.NewSectionReader(content, offset, rest), make([]byte, pieceSize))
	if err == nil && n < rest {
		err = changed(loc.path)
	}
	return fileError(loc.path, err)
}

// readGenerated returns the content of a file that the kernel generates. m holds it.
func readGenerated(f *os.File, m *memory) (string, error) {
	var text strings.Builder
	buf := make([]byte, pieceSize)
	for {
		// A read of the file itself would wait for the events of such files as /proc/kmsg.
		n, err := unix.Read(int(f.Fd()), buf)
		if err != nil {
			return "", err
		}
		if n == 0 {
			return text.String(), nil
		}
		if text.Len()+n > maxGenerated {
			return "", status.Errorf(codes.FailedPrecondition, "%s has more than %d KiB, the limit for files that the kernel generates: read it with a command", quote(f.Name()), maxGenerated>>10)
		}
		if err := m.hold(2 * n); err != nil { // text may have room for as much as it has
			return "", err
		}
		text.Write(buf[:n])
	}
}

// pieces is a writer that passes data on in pieces of at most pieceSize bytes.
type pieces func(data []byte) error

func (send pieces) Write(data []byte) (n int, err error) {
	for n < len(data) {
		piece := data[n:min(n+pieceSize, len(data))]
		if err := send(piece); err != nil {
			return n, err
		}
		n += len(piece)
	}
	return n, nil
}

// WriteFile implements portalv1.FileServiceServer.
func (s *fileServer) WriteFile(stream grpc.ClientStreamingServer[portalv1.WriteFileRequest, portalv1.WriteFileResponse]) error {
	req, err := stream.Recv()
	if err != nil && err != io.EOF {
		return err
	}
	start := req.GetStart()
	if start == nil {
		return status.Error(codes.InvalidArgument, "the first message has no start")
	}
	loc, err := locateForWriting(start.GetFile())
	if err != nil {
		return err
	}
	if err := checkMode(start.GetMode()); err != nil {
		return err
	}
	if err := checkXattrs(start.GetXattrs()); err != nil {
		return err
	}
	if start.GetOffset() < 0 {
		return status.Error(codes.InvalidArgument, "offset is negative: use 0 or more")
	}
	var data io.Reader = upload(stream, func(req *portalv1.WriteFileRequest) ([]byte, bool) {
		_, ok := req.GetPart().(*portalv1.WriteFileRequest_Data)
		return req.GetData(), ok
	})
	if start.GetTransfer() != "" {
		conn, err := s.transfers.receive(stream.Context(), start.GetTransfer(), func() error { return stream.SendHeader(nil) })
		if err != nil {
			return err
		}
		if conn != nil {
			defer conn.Close()
			data = io.LimitReader(conn, start.GetLength())
		}
	}
	resp, err := loc.write(start, data)
	if err != nil {
		return fileError(loc.path, err)
	}
	return stream.SendAndClose(resp)
}

// uploaded is the data of the messages of an upload. It implements io.Reader.
type uploaded struct {
	next func() ([]byte, error) // the data of the next message, or io.EOF
	rest []byte
}

// upload returns the data of the messages that follow in the stream. data reports whether a message has data, and returns it.
func upload[Request, Response any](stream grpc.ClientStreamingServer[Request, Response], data func(*Request) ([]byte, bool)) *uploaded {
	return &uploaded{next: func() ([]byte, error) {
		req, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		if data, ok := data(req); ok {
			return data, nil
		}
		return nil, status.Error(codes.InvalidArgument, "a message after the first has no data")
	}}
}

// Read implements io.Reader.
func (u *uploaded) Read(b []byte) (n int, err error) {
	for len(u.rest) == 0 {
		if u.rest, err = u.next(); err != nil {
			return 0, err
		}
	}
	n = copy(b, u.rest)
	u.rest = u.rest[n:]
	return n, nil
}

// WriteTo implements io.WriterTo, without another copy of the data.
func (u *uploaded) WriteTo(w io.Writer) (written int64, err error) {
	for {
		n, err := w.Write(u.rest)
		written += int64(n)
		if err != nil {
			return written, err
		}
		if u.rest, err = u.next(); err == io.EOF {
			return written, nil
		} else if err != nil {
			return written, err
		}
	}
}

// checkXattrs returns an error unless a request may set the attributes.
func checkXattrs(attrs map[string][]byte) error {
	total := 0
	for name, value := range attrs {
		if !strings.HasPrefix(name, "user.") || strings.ContainsRune(name, 0) {
			return status.Errorf(codes.InvalidArgument, "extended attribute %s cannot be set: use a name that begins with \"user.\"", quote(name))
		}
		total += len(name) + len(value)
	}
	if total > maxXattrs {
		return status.Errorf(codes.InvalidArgument, "the extended attributes have more than %d KiB", maxXattrs>>10)
	}
	return nil
}

// setXattrs sets extended attributes of an open file.
func setXattrs(f *os.File, attrs map[string][]byte) error {
	for name, value := range attrs {
		if err := unix.Fsetxattr(int(f.Fd()), name, value, 0); err != nil {
			return err
		}
	}
	return nil
}

// write writes data to a file, as start requests.
func (l location) write(start *portalv1.WriteFileRequest_Start, data io.Reader) (_ *portalv1.WriteFileResponse, err error) {
	path, err := followLinks(l.path)
	if err != nil {
		return nil, err
	}
	target := location{path, l.user}
	var before unix.Stat_t
	err = unix.Lstat(path, &before)
	created := err == unix.ENOENT
	switch {
	case created:
		if err := target.makeParents(); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, err
	case before.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, notRegular(l.path, before.Mode)
	}

	inPlace := start.Offset != nil
	var f *os.File
	switch {
	case !inPlace:
		f, err = os.CreateTemp(filepath.Dir(path), tempPattern)
		if err == nil {
			defer os.Remove(f.Name()) // does nothing once it was renamed
		}
	case created:
		f, err = os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	default:
		f, err = os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if inPlace {
		if _, err := f.Seek(start.GetOffset(), io.SeekStart); err != nil {
			return nil, err
		}
	}
	n, err := io.Copy(f, data) // in the kernel, if data is that of a TCP connection
	ended := errors.Is(err, os.ErrClosed) || errors.Is(err, net.ErrClosed) || errors.Is(err, unix.ECONNRESET)
	if start.GetTransfer() != "" && (ended || err == nil && n != start.GetLength()) {
		err = errTransferEnded
	}
	if err != nil {
		return nil, err
	}

	// The kernel may clear bits of the mode when the owner changes, and may permit attributes only while the mode does.
	if err := setXattrs(f, start.GetXattrs()); err != nil {
		return nil, err
	}
	mode := uint32(0o644)
	if !created {
		mode = before.Mode & permissions
	}
	if start.Mode != nil {
		mode = start.GetMode()
	}
	switch {
	case created || !inPlace && l.user != nil:
		err = l.chown(f)
	case !inPlace:
		err = f.Chown(int(before.Uid), int(before.Gid))
	}
	if err != nil {
		return nil, err
	}
	if err := unix.Fchmod(int(f.Fd()), mode); err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	if err := f.Close(); err != nil {
		return nil, err
	}
	if !inPlace {
		if err := unix.Rename(f.Name(), path); err != nil {
			return nil, err
		}
	}
	return &portalv1.WriteFileResponse{Info: newNameTable().info(l.path, &st), Created: created}, nil
}

// followLinks returns the path to which the symbolic links at the end of path lead. There may be no file.
func followLinks(path string) (string, error) {
	const maxLinks = 40 // as in the kernel
	for range maxLinks {
		target, err := os.Readlink(path)
		if err != nil {
			return path, nil // not a link
		}
		if !filepath.IsAbs(target) {
			// Only the kernel can resolve a ".." that follows a link, so the path is not cleaned.
			target = path[:strings.LastIndexByte(path, '/')+1] + target
		}
		path = target
	}
	return "", unix.ELOOP
}
