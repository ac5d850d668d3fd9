package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// files are the calls of FileService on a guest.
type files struct {
	portalv1.FileServiceClient
	pid int // of the portal
}

// startFiles starts a portal as the user uid and connects to it.
func startFiles(t testing.TB, uid uint32) files {
	t.Helper()
	g := newGuest()
	serve := msbPortal(t, "serve", g.socket)
	serve.Path = "/proc/self/exe" // another user may not enter the directory of the test's program
	serve.Dir = "/"
	serve.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	if int(uid) == os.Getuid() {
		serve.SysProcAttr = nil
	}
	g.start(t, serve)
	return files{portalv1.NewFileServiceClient(g.dial(t).conn), serve.Process.Pid}
}

// as returns path with the owner of new files.
func as(user, path string) *portalv1.FilePath {
	return &portalv1.FilePath{Path: []byte(path), User: user}
}

func at(path string) *portalv1.FilePath { return as("", path) }

func (c files) stat(t testing.TB, path string) *portalv1.FileInfo {
	t.Helper()
	resp, err := c.StatFile(t.Context(), &portalv1.StatFileRequest{File: at(path), Xattrs: true})
	if err != nil {
		t.Fatal(err)
	}
	return resp.GetInfo()
}

// all returns the messages of a stream.
func all[T any](stream grpc.ServerStreamingClient[T], err error) (all []*T, _ error) {
	if err != nil {
		return nil, err
	}
	for {
		msg, err := stream.Recv()
		if err == io.EOF {
			return all, nil
		}
		if err != nil {
			return all, err
		}
		all = append(all, msg)
	}
}

func (c files) list(ctx context.Context, path string, depth uint32) ([]string, error) {
	resps, err := all(c.ListFiles(ctx, &portalv1.ListFilesRequest{Directory: at(path), Depth: depth}))
	var paths []string
	for _, r := range resps {
		paths = append(paths, string(r.GetInfo().GetPath()))
	}
	return paths, err
}

func (c files) read(ctx context.Context, req *portalv1.ReadFileRequest) (*portalv1.FileInfo, []byte, error) {
	resps, err := all(c.ReadFile(ctx, req))
	if len(resps) == 0 {
		return nil, nil, err
	}
	var data []byte
	for _, r := range resps[1:] {
		if n := len(r.GetData()); n == 0 || n > 64<<10 {
			return nil, nil, fmt.Errorf("a message has %d bytes", n)
		}
		data = append(data, r.GetData()...)
	}
	return resps[0].GetInfo(), data, err
}

// write writes data in several messages.
func (c files) write(ctx context.Context, start *portalv1.WriteFileRequest_Start, data []byte) (*portalv1.WriteFileResponse, error) {
	stream, err := c.WriteFile(ctx)
	if err != nil {
		return nil, err
	}
	// If a Send fails, CloseAndRecv returns why.
	err = stream.Send(&portalv1.WriteFileRequest{Part: &portalv1.WriteFileRequest_Start_{Start: start}})
	for piece := range slices.Chunk(data, 60_000) {
		if err == nil {
			err = stream.Send(&portalv1.WriteFileRequest{Part: &portalv1.WriteFileRequest_Data{Data: piece}})
		}
	}
	return stream.CloseAndRecv()
}

func (c files) move(ctx context.Context, from, to string) error {
	_, err := c.MoveFile(ctx, &portalv1.MoveFileRequest{Source: at(from), Destination: at(to)})
	return err
}

func (c files) remove(ctx context.Context, path string, recursive bool) error {
	_, err := c.RemoveFile(ctx, &portalv1.RemoveFileRequest{File: at(path), Recursive: recursive})
	return err
}

// wantError checks the code and a part of the text of an error.
func wantError(t testing.TB, what string, err error, code codes.Code, text string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), text) {
		t.Errorf("%s: got error %v, want %v with %q", what, err, code, text)
	}
}

func noError(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// create creates a file with the permission bits mode.
func create(t testing.TB, path, data string, mode uint32) {
	t.Helper()
	noError(t, os.WriteFile(path, []byte(data), 0o600))
	noError(t, unix.Chmod(path, mode))
}

// content returns what a file has.
func content(t testing.TB, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	noError(t, err)
	return string(data)
}

func lstat(t testing.TB, path string) *unix.Stat_t {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		t.Fatalf("lstat %q: %v", path, err)
	}
	return &st
}

// wantStat checks the permission bits and the owner of a file.
func wantStat(t testing.TB, path string, mode, uid, gid uint32) {
	t.Helper()
	if st := lstat(t, path); st.Mode&0o7777 != mode || st.Uid != uid || st.Gid != gid {
		t.Errorf("%s has mode %#o and owner %d:%d, want %#o and %d:%d", path, st.Mode&0o7777, st.Uid, st.Gid, mode, uid, gid)
	}
}

// wantNames checks the names in a directory.
func wantNames(t testing.TB, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	noError(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	slices.Sort(want)
	if !slices.Equal(names, want) {
		t.Errorf("%s has %q, want %q", dir, names, want)
	}
}

// oddNames are file names that the kernel allows.
var oddNames = []string{
	" ", "-rf", "a\nb", "*", "\x1b[2J", "\xff\xfe", "ä€😀", "a=b", "%3D", strings.Repeat("x", 255), "..x", "'\"\\",
}

// mountTmpfs mounts an empty file system of size bytes.
func mountTmpfs(t testing.TB, size int) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("only root can mount a file system")
	}
	dir := t.TempDir()
	noError(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0755,size="+strconv.Itoa(size)))
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

func TestStatFile(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	file := filepath.Join(dir, "file")
	create(t, file, "12345", 0o4751)
	noError(t, os.Chown(file, 1, 12345678))
	noError(t, unix.Chmod(file, 0o4751))
	noError(t, unix.Setxattr(file, "user.a", []byte("x\x00\xff"), 0))
	noError(t, unix.Setxattr(file, "user.empty", nil, 0))
	noError(t, unix.Setxattr(file, "trusted.a", []byte("x"), 0))
	modified := time.Unix(-5, 123456789)
	noError(t, os.Chtimes(file, modified, modified))

	info := c.stat(t, file)
	if string(info.GetPath()) != file || info.GetType() != portalv1.FileType_FILE_TYPE_REGULAR || info.GetSize() != 5 ||
		info.GetMode() != 0o4751 || info.GetUid() != 1 || info.GetGid() != 12345678 || info.GetUser() != "daemon" ||
		info.GetGroup() != "" || !info.GetModifiedAt().AsTime().Equal(modified) || info.GetTarget() != nil {
		t.Errorf("got %v", info)
	}
	if attrs := info.GetXattrs(); len(attrs) != 2 || string(attrs["user.a"]) != "x\x00\xff" || attrs["user.empty"] == nil && len(attrs) != 2 {
		t.Errorf("got extended attributes %q", attrs)
	}
	if resp, err := c.StatFile(t.Context(), &portalv1.StatFileRequest{File: at(file)}); err != nil || len(resp.GetInfo().GetXattrs()) != 0 {
		t.Errorf("without extended attributes: got %v, error %v", resp, err)
	}

	for i, name := range oddNames {
		path := filepath.Join(dir, name)
		create(t, path, "", 0o600)
		if got := c.stat(t, path); string(got.GetPath()) != path {
			t.Errorf("name %d: got path %q, want %q", i, got.GetPath(), path)
		}
	}

	link := filepath.Join(dir, "link")
	noError(t, os.Symlink("middle", link))
	noError(t, os.Symlink("../"+filepath.Base(dir)+"/file", filepath.Join(dir, "middle")))
	info = c.stat(t, link)
	if info.GetType() != portalv1.FileType_FILE_TYPE_SYMLINK || string(info.GetLinkTarget()) != "middle" ||
		string(info.GetTarget().GetPath()) != file || info.GetTarget().GetSize() != 5 {
		t.Errorf("symbolic link: got %v", info)
	}
	for _, target := range []string{"missing", "loop"} {
		loop := filepath.Join(dir, "loop")
		os.Remove(loop)
		noError(t, os.Symlink(target, loop))
		if info := c.stat(t, loop); info.GetTarget() != nil || string(info.GetLinkTarget()) != target {
			t.Errorf("link to %s: got %v", target, info)
		}
	}
	if info := c.stat(t, dir); info.GetType() != portalv1.FileType_FILE_TYPE_DIRECTORY {
		t.Errorf("directory: got %v", info)
	}
	if info := c.stat(t, "/dev/null"); info.GetType() != portalv1.FileType_FILE_TYPE_OTHER {
		t.Errorf("device: got %v", info)
	}
}

func TestPaths(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	create(t, filepath.Join(dir, "file"), "", 0o600)
	stat := func(path *portalv1.FilePath) (string, error) {
		resp, err := c.StatFile(t.Context(), &portalv1.StatFileRequest{File: path})
		return string(resp.GetInfo().GetPath()), err
	}
	for _, p := range []struct {
		path *portalv1.FilePath
		want string
	}{
		{at(dir + "/x/..//file/"), dir + "/file"},
		{&portalv1.FilePath{Path: []byte("file"), Workdir: dir}, dir + "/file"},
		{&portalv1.FilePath{Path: []byte("."), Workdir: dir}, dir},
		{&portalv1.FilePath{Path: []byte("/"), Workdir: dir}, "/"},
		{at("etc"), "/etc"}, // the portal's working directory is /
		{as("bin", "~"), "/bin"},
		{as("2", "~/sh"), "/bin/sh"},
		{at("~/.."), filepath.Dir(os.Getenv("HOME"))},
		{&portalv1.FilePath{Path: []byte("../" + filepath.Base(dir)), Workdir: dir}, dir},
	} {
		if got, err := stat(p.path); err != nil || got != p.want {
			t.Errorf("%v: got %q, error %v, want %q", p.path, got, err, p.want)
		}
	}
	for what, p := range map[string]struct {
		path *portalv1.FilePath
		code codes.Code
		text string
	}{
		"missing":          {at(dir + "/a\nb\xff"), codes.NotFound, `a\nb\xff" does not exist`},
		"long path":        {at("/" + strings.Repeat("a/", 5000)), codes.InvalidArgument, "is too long"},
		"long name":        {at("/" + strings.Repeat("a", 256)), codes.InvalidArgument, "is too long"},
		"below a file":     {at(dir + "/file/x"), codes.FailedPrecondition, "is not a directory"},
		"empty":            {at(""), codes.InvalidArgument, "is empty"},
		"none":             {nil, codes.InvalidArgument, "is empty"},
		"NUL":              {at("/a\x00b"), codes.InvalidArgument, "NUL"},
		"NUL in workdir":   {&portalv1.FilePath{Path: []byte("a"), Workdir: "/\x00"}, codes.InvalidArgument, "NUL"},
		"an unknown user":  {as("nobody-here", "/"), codes.InvalidArgument, "does not exist"},
		"an unknown group": {as("root:nobody-here", "/"), codes.InvalidArgument, "does not exist"},
		"no user's home":   {at("~root"), codes.NotFound, "does not exist"},
	} {
		_, err := stat(p.path)
		wantError(t, what, err, p.code, p.text)
		if n := len(status.Convert(err).Message()); n > 2<<10+len("…") {
			t.Errorf("%s: the error has %d bytes", what, n)
		}
	}
}

func TestListFiles(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	for _, d := range []string{"b/c/d", "empty", "b-"} {
		noError(t, os.MkdirAll(filepath.Join(dir, d), 0o755))
	}
	for _, f := range []string{"a", "b/c/d/deep", "b/z", "z"} {
		create(t, filepath.Join(dir, f), f, 0o644)
	}
	noError(t, os.Symlink("b", filepath.Join(dir, "link")))
	for _, p := range []struct {
		depth uint32
		want  string
	}{
		{0, "a b b- empty link z"},
		{1, "a b b- empty link z"},
		{2, "a b b/c b/z b- empty link z"},
		{1<<32 - 1, "a b b/c b/c/d b/c/d/deep b/z b- empty link z"},
	} {
		got, err := c.list(t.Context(), dir, p.depth)
		if text := strings.ReplaceAll(strings.Join(got, " "), dir+"/", ""); err != nil || text != p.want {
			t.Errorf("depth %d: got %s, error %v, want %s", p.depth, text, err, p.want)
		}
	}
	if got, err := c.list(t.Context(), dir+"/link", 1); err != nil || !slices.Equal(got, []string{dir + "/link/c", dir + "/link/z"}) {
		t.Errorf("through a symbolic link: got %q, error %v", got, err)
	}
	_, err := c.list(t.Context(), dir+"/a", 1)
	wantError(t, "file", err, codes.FailedPrecondition, "is not a directory")
	_, err = c.list(t.Context(), dir+"/missing", 1)
	wantError(t, "missing", err, codes.NotFound, "does not exist")

	odd := t.TempDir()
	for _, name := range oddNames {
		create(t, filepath.Join(odd, name), "", 0o600)
	}
	var want []string
	for _, name := range oddNames {
		want = append(want, filepath.Join(odd, name))
	}
	slices.Sort(want)
	if got, err := c.list(t.Context(), odd, 1); err != nil || !slices.Equal(got, want) {
		t.Errorf("odd names: got %q, error %v, want %q", got, err, want)
	}
}

// TestListLargeTree lists more entries than fit into the windows of a connection, while a part of them is removed.
func TestListLargeTree(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	for i := range 100 {
		sub := filepath.Join(dir, fmt.Sprintf("%02d", i))
		noError(t, os.Mkdir(sub, 0o755))
		for j := range 100 {
			create(t, filepath.Join(sub, fmt.Sprintf("%02d", j)), "", 0o600)
		}
	}
	if got, err := c.list(t.Context(), dir, 2); err != nil || len(got) != 10_100 || !slices.IsSorted(got) {
		t.Errorf("got %d entries, error %v, want 10100", len(got), err)
	}
	stream, err := c.ListFiles(t.Context(), &portalv1.ListFilesRequest{Directory: at(dir), Depth: 2})
	noError(t, err)
	_, err = stream.Recv()
	noError(t, err)
	for i := range 100 {
		noError(t, os.RemoveAll(filepath.Join(dir, fmt.Sprintf("%02d", i))))
	}
	for err == nil {
		_, err = stream.Recv()
	}
	if err != io.EOF {
		t.Errorf("the entries vanish: got error %v", err)
	}
	// Processes come and go in /proc.
	if got, err := c.list(t.Context(), "/proc", 2); err != nil || len(got) < 100 {
		t.Errorf("/proc: got %d entries, error %v", len(got), err)
	}
}

func TestReadFile(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	data := make([]byte, 200_000)
	rand.Read(data)
	file := filepath.Join(dir, "file")
	noError(t, os.WriteFile(file, data, 0o640))
	noError(t, os.Symlink("file", filepath.Join(dir, "link")))
	size := int64(len(data))
	for _, p := range []struct{ offset, length, from, to int64 }{
		{0, -1, 0, size}, {0, 0, 0, 0}, {0, 1, 0, 1}, {7, 100_000, 7, 100_007}, {100, -1, 100, size}, {100, 1 << 62, 100, size},
		{size, -1, size, size}, {size + 1, 5, size, size}, {1<<63 - 1, 1<<63 - 1, size, size}, {size - 1, -1, size - 1, size},
	} {
		req := &portalv1.ReadFileRequest{File: at(dir + "/link"), Offset: p.offset}
		if p.length >= 0 {
			req.Length = &p.length
		}
		info, got, err := c.read(t.Context(), req)
		if err != nil || !bytes.Equal(got, data[p.from:p.to]) {
			t.Errorf("offset %d, length %d: got %d bytes, error %v, want %d", p.offset, p.length, len(got), err, p.to-p.from)
		}
		if info.GetSize() != size || info.GetMode() != 0o640 || info.GetType() != portalv1.FileType_FILE_TYPE_REGULAR {
			t.Errorf("got %v", info)
		}
	}

	noError(t, unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600))
	lis, err := net.Listen("unix", filepath.Join(dir, "socket"))
	noError(t, err)
	defer lis.Close()
	for _, p := range []struct {
		path string
		code codes.Code
		text string
	}{
		{dir, codes.FailedPrecondition, "is a directory"},
		{dir + "/fifo", codes.FailedPrecondition, "is not a regular file"},
		{dir + "/socket", codes.FailedPrecondition, "is not a regular file"},
		{"/dev/zero", codes.FailedPrecondition, "is not a regular file"},
		{dir + "/missing", codes.NotFound, "does not exist"},
		{"/proc/kmsg", codes.FailedPrecondition, "cannot be used"}, // a read waits for messages of the kernel
		{"/proc/kallsyms", codes.FailedPrecondition, "has more than 1024 KiB"},
	} {
		_, _, err := c.read(t.Context(), &portalv1.ReadFileRequest{File: at(p.path)})
		wantError(t, p.path, err, p.code, p.text)
	}
	for _, req := range []*portalv1.ReadFileRequest{
		{File: at(file), Offset: -1}, {File: at(file), Length: proto.Int64(-1)},
	} {
		_, _, err := c.read(t.Context(), req)
		wantError(t, req.String(), err, codes.InvalidArgument, "negative")
	}
	// These files have the sizes 0 and 4096.
	for _, path := range []string{"/proc/version", "/sys/kernel/mm/transparent_hugepage/enabled", "/sys/kernel/profiling"} {
		if _, err := os.Stat(path); err != nil {
			continue
		}
		want := content(t, path)
		if info, got, err := c.read(t.Context(), &portalv1.ReadFileRequest{File: at(path)}); err != nil || string(got) != want || info.GetSize() != int64(len(want)) {
			t.Errorf("%s: got %q, error %v, size %d, want %q", path, got, err, info.GetSize(), want)
		}
	}
}

func TestReadFileThatChanges(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	file := filepath.Join(dir, "file")
	const size = 64 << 20
	for _, p := range []struct {
		size int64
		code codes.Code
		n    int
	}{{0, codes.FailedPrecondition, 0}, {2 * size, codes.OK, size}} {
		create(t, file, "", 0o600)
		noError(t, os.Truncate(file, size))
		stream, err := c.ReadFile(t.Context(), &portalv1.ReadFileRequest{File: at(file)})
		noError(t, err)
		_, err = stream.Recv()
		noError(t, err)
		// The portal cannot have read it all, because the connection takes less.
		noError(t, os.Truncate(file, p.size))
		n := 0
		for err == nil {
			var resp *portalv1.ReadFileResponse
			resp, err = stream.Recv()
			n += len(resp.GetData())
		}
		if p.code == codes.OK {
			if err != io.EOF || n != p.n {
				t.Errorf("a file that grows: got %d bytes, error %v", n, err)
			}
			continue
		}
		wantError(t, "a file that shrinks", err, p.code, "changed while it was read")
	}
}

func TestWriteFile(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	write := func(start *portalv1.WriteFileRequest_Start, data string) *portalv1.WriteFileResponse {
		t.Helper()
		resp, err := c.write(t.Context(), start, []byte(data))
		if err != nil {
			t.Fatalf("%v: %v", start, err)
		}
		return resp
	}
	mode := func(m uint32) *uint32 { return &m }

	resp := write(&portalv1.WriteFileRequest_Start{File: as("daemon:bin", in("a/b/new")), Xattrs: map[string][]byte{"user.x": []byte("\x00y")}}, "data\x00\n")
	if info := resp.GetInfo(); !resp.GetCreated() || string(info.GetPath()) != in("a/b/new") || info.GetSize() != 6 || info.GetUid() != 1 || info.GetMode() != 0o644 {
		t.Errorf("a new file: got %v", resp)
	}
	if got := content(t, in("a/b/new")); got != "data\x00\n" {
		t.Errorf("a new file has %q", got)
	}
	wantStat(t, in("a"), 0o755, 1, 2)
	wantStat(t, in("a/b"), 0o755, 1, 2)
	wantStat(t, in("a/b/new"), 0o644, 1, 2)
	if attrs := c.stat(t, in("a/b/new")).GetXattrs(); string(attrs["user.x"]) != "\x00y" {
		t.Errorf("a new file has extended attributes %q", attrs)
	}
	write(&portalv1.WriteFileRequest_Start{File: at(in("empty"))}, "")
	wantStat(t, in("empty"), 0o644, uint32(os.Getuid()), uint32(os.Getgid()))
	// The portal's umask does not apply, and a new owner does not clear the bits.
	write(&portalv1.WriteFileRequest_Start{File: as("3:4", in("setuid")), Mode: mode(0o6777)}, "x")
	wantStat(t, in("setuid"), 0o6777, 3, 4)

	// Replaced files.
	create(t, in("old"), "old content", 0o600)
	noError(t, os.Chown(in("old"), 5, 6))
	noError(t, unix.Chmod(in("old"), 0o2715))
	if resp := write(&portalv1.WriteFileRequest_Start{File: at(in("old"))}, "new"); resp.GetCreated() {
		t.Errorf("a replaced file: got %v", resp)
	}
	wantStat(t, in("old"), 0o2715, 5, 6)
	write(&portalv1.WriteFileRequest_Start{File: as("1", in("old")), Mode: mode(0)}, "newer")
	wantStat(t, in("old"), 0, 1, 1)
	if got := content(t, in("old")); got != "newer" {
		t.Errorf("a replaced file has %q", got)
	}

	// Links.
	noError(t, os.Symlink("b/link2", in("a/link")))
	noError(t, os.Symlink("../../target", in("a/b/link2")))
	noError(t, os.Symlink("a/b", in("to-b")))
	for _, created := range []bool{true, false} {
		resp := write(&portalv1.WriteFileRequest_Start{File: at(in("a/link"))}, fmt.Sprint(created))
		if resp.GetCreated() != created || content(t, in("target")) != fmt.Sprint(created) {
			t.Errorf("through a link: got %v", resp)
		}
	}
	// The kernel resolves ".." after the link, not before it.
	noError(t, os.Symlink("to-b/../dotdot", in("indirect")))
	write(&portalv1.WriteFileRequest_Start{File: at(in("indirect"))}, "x")
	if content(t, in("a/dotdot")) != "x" || lstat(t, in("a/link")).Mode&unix.S_IFMT != unix.S_IFLNK {
		t.Error("a link was replaced, or led to another file")
	}

	// In place.
	create(t, in("place"), "0123456789", 0o600)
	inode := lstat(t, in("place")).Ino
	write(&portalv1.WriteFileRequest_Start{File: as("1", in("place")), Offset: proto.Int64(3)}, "abc")
	write(&portalv1.WriteFileRequest_Start{File: at(in("place")), Offset: proto.Int64(12), Mode: mode(0o640)}, "z")
	if got := content(t, in("place")); got != "012abc6789\x00\x00z" || lstat(t, in("place")).Ino != inode {
		t.Errorf("in place: got %q", got)
	}
	wantStat(t, in("place"), 0o640, 0, 0)
	if resp := write(&portalv1.WriteFileRequest_Start{File: as("1", in("new/place")), Offset: proto.Int64(1)}, "x"); !resp.GetCreated() || content(t, in("new/place")) != "\x00x" {
		t.Errorf("a new file with an offset: got %v", resp)
	}
	wantStat(t, in("new/place"), 0o644, 1, 1)

	for _, name := range oddNames {
		write(&portalv1.WriteFileRequest_Start{File: at(in("odd/" + name))}, name)
	}
	wantNames(t, in("odd"), oddNames...)

	noError(t, unix.Mkfifo(in("fifo"), 0o600))
	noError(t, os.Symlink("loop", in("loop")))
	busy := in("busy")
	program, err := os.ReadFile("/bin/sleep")
	noError(t, err)
	noError(t, os.WriteFile(busy, program, 0o755))
	running := exec.Command(busy, "1000")
	noError(t, running.Start())
	defer func() { _ = running.Process.Kill(); _ = running.Wait() }()
	for what, p := range map[string]struct {
		start *portalv1.WriteFileRequest_Start
		code  codes.Code
		text  string
	}{
		"directory":           {&portalv1.WriteFileRequest_Start{File: at(dir)}, codes.FailedPrecondition, "is a directory"},
		"pipe":                {&portalv1.WriteFileRequest_Start{File: at(in("fifo"))}, codes.FailedPrecondition, "is not a regular file"},
		"pipe with an offset": {&portalv1.WriteFileRequest_Start{File: at(in("fifo")), Offset: proto.Int64(0)}, codes.FailedPrecondition, "is not a regular file"},
		"loop":                {&portalv1.WriteFileRequest_Start{File: at(in("loop"))}, codes.FailedPrecondition, "too many symbolic links"},
		"file in the way":     {&portalv1.WriteFileRequest_Start{File: at(in("old/x"))}, codes.FailedPrecondition, "is not a directory"},
		"file far up":         {&portalv1.WriteFileRequest_Start{File: at(in("old/x/y"))}, codes.FailedPrecondition, "is not a directory"},
		"mode":                {&portalv1.WriteFileRequest_Start{File: at(in("x")), Mode: mode(0o10000)}, codes.InvalidArgument, "07777"},
		"offset":              {&portalv1.WriteFileRequest_Start{File: at(in("x")), Offset: proto.Int64(-1)}, codes.InvalidArgument, "negative"},
		"far offset":          {&portalv1.WriteFileRequest_Start{File: at(in("place")), Offset: proto.Int64(1<<63 - 1)}, codes.InvalidArgument, "does not accept"},
		"xattr":               {&portalv1.WriteFileRequest_Start{File: at(in("x")), Xattrs: map[string][]byte{"trusted.x": nil}}, codes.InvalidArgument, "user."},
		"xattrs":              {&portalv1.WriteFileRequest_Start{File: at(in("x")), Xattrs: map[string][]byte{"user.x": make([]byte, 64<<10)}}, codes.InvalidArgument, "64 KiB"},
		"user":                {&portalv1.WriteFileRequest_Start{File: as("nobody-here", in("x"))}, codes.InvalidArgument, "does not exist"},
		"name":                {&portalv1.WriteFileRequest_Start{File: at(in(strings.Repeat("x", 256)))}, codes.InvalidArgument, "too long"},
		"running program":     {&portalv1.WriteFileRequest_Start{File: at(busy), Offset: proto.Int64(0)}, codes.FailedPrecondition, "is running"},
		"read-only":           {&portalv1.WriteFileRequest_Start{File: at("/sys/kernel/x")}, codes.FailedPrecondition, "/sys/kernel/x"},
	} {
		_, err := c.write(t.Context(), p.start, []byte("data"))
		wantError(t, what, err, p.code, p.text)
	}
	// A running program can be replaced.
	write(&portalv1.WriteFileRequest_Start{File: at(busy)}, "x")

	stream, err := c.WriteFile(t.Context())
	noError(t, err)
	noError(t, stream.Send(&portalv1.WriteFileRequest{Part: &portalv1.WriteFileRequest_Data{Data: []byte("data")}}))
	_, err = stream.CloseAndRecv()
	wantError(t, "no start", err, codes.InvalidArgument, "start")
	stream, err = c.WriteFile(t.Context())
	noError(t, err)
	_, err = stream.CloseAndRecv()
	wantError(t, "nothing", err, codes.InvalidArgument, "start")
	stream, err = c.WriteFile(t.Context())
	noError(t, err)
	for range 2 {
		noError(t, stream.Send(&portalv1.WriteFileRequest{Part: &portalv1.WriteFileRequest_Start_{
			Start: &portalv1.WriteFileRequest_Start{File: at(in("x"))},
		}}))
	}
	_, err = stream.CloseAndRecv()
	wantError(t, "two starts", err, codes.InvalidArgument, "no data")
	wantNames(t, dir, "a", "busy", "empty", "fifo", "indirect", "loop", "new", "odd", "old", "place", "setuid", "target", "to-b")
}

// TestWriteFileCanceled cancels a call after its data is in a temporary file.
func TestWriteFileCanceled(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	create(t, filepath.Join(dir, "file"), "old", 0o600)
	events := c.watch(t, &portalv1.WatchFilesRequest{Path: at(dir)})
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := c.WriteFile(ctx)
	noError(t, err)
	noError(t, stream.Send(&portalv1.WriteFileRequest{Part: &portalv1.WriteFileRequest_Start_{
		Start: &portalv1.WriteFileRequest_Start{File: at(filepath.Join(dir, "file"))},
	}}))
	noError(t, stream.Send(&portalv1.WriteFileRequest{Part: &portalv1.WriteFileRequest_Data{Data: []byte("new")}}))
	for _, want := range []string{"CREATE", "WRITE"} {
		if got := events.next(); !strings.HasPrefix(got, want+" .msb-") {
			t.Fatalf("got event %s, want %s", got, want)
		}
	}
	cancel()
	if got := events.next(); !strings.HasPrefix(got, "REMOVE .msb-") {
		t.Errorf("got event %s", got)
	}
	wantNames(t, dir, "file")
	if got := content(t, filepath.Join(dir, "file")); got != "old" {
		t.Errorf("the file has %q", got)
	}
}

// TestConcurrentWriters checks that readers always get one complete version of a file.
func TestConcurrentWriters(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	file := filepath.Join(dir, "file")
	create(t, file, strings.Repeat("0", 300_000), 0o644)
	var writers sync.WaitGroup
	for i := range 4 {
		writers.Go(func() {
			for range 20 {
				if _, err := c.write(t.Context(), &portalv1.WriteFileRequest_Start{File: at(file)}, bytes.Repeat([]byte{'a' + byte(i)}, 300_000+i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	done := make(chan struct{})
	go func() { writers.Wait(); close(done) }()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		_, data, err := c.read(t.Context(), &portalv1.ReadFileRequest{File: at(file)})
		if err != nil {
			t.Error(err)
			break
		}
		if n := bytes.Count(data, data[:1]); n != len(data) || n < 300_000 {
			t.Errorf("a reader got %d bytes, of which %d are the first", len(data), n)
			break
		}
	}
	<-done
	wantNames(t, dir, "file")
}

// TestLargeFile checks the bytes of a large file, and how much memory the portal needs for it.
func TestLargeFile(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	file := filepath.Join(dir, "file")
	data := make([]byte, 64<<20)
	rand.Read(data)
	before := c.peakMemory(t)
	_, err := c.write(t.Context(), &portalv1.WriteFileRequest_Start{File: at(file)}, data)
	noError(t, err)
	_, got, err := c.read(t.Context(), &portalv1.ReadFileRequest{File: at(file)})
	if err != nil || sha256.Sum256(got) != sha256.Sum256(data) {
		t.Errorf("got %d bytes, error %v, which differ", len(got), err)
	}
	if growth := c.peakMemory(t) - before; growth > 24<<20 {
		t.Errorf("the portal needed %d MiB more than before", growth>>20)
	}
}

// peakMemory returns the largest resident memory of the portal so far, in bytes.
func (c files) peakMemory(t testing.TB) int {
	for line := range strings.Lines(content(t, fmt.Sprintf("/proc/%d/status", c.pid))) {
		if fields := strings.Fields(line); fields[0] == "VmHWM:" {
			kib, err := strconv.Atoi(fields[1])
			noError(t, err)
			return kib << 10
		}
	}
	t.Fatal("no VmHWM")
	return 0
}

func TestNoSpaceLeft(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), mountTmpfs(t, 1<<20)
	file := filepath.Join(dir, "file")
	create(t, file, "old", 0o600)
	data := make([]byte, 2<<20)
	_, err := c.write(t.Context(), &portalv1.WriteFileRequest_Start{File: at(file)}, data)
	wantError(t, "WriteFile", err, codes.ResourceExhausted, "no space left")
	wantNames(t, dir, "file")
	if content(t, file) != "old" {
		t.Error("the file was changed")
	}
	source := filepath.Join(t.TempDir(), "source")
	noError(t, os.WriteFile(source, data, 0o600))
	wantError(t, "MoveFile", c.move(t.Context(), source, file), codes.ResourceExhausted, "no space left")
	if content(t, source) != string(data) || content(t, file) != "old" {
		t.Error("a file was changed")
	}
	wantNames(t, dir, "file")
	_, err = c.writeTree(t.Context(), as("", dir), false, tarOf(t, entry{Name: "big", data: string(data)}))
	wantError(t, "WriteTree", err, codes.ResourceExhausted, "no space left")
}

func TestMakeDirectory(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	mkdir := func(path *portalv1.FilePath, mode *uint32) (*portalv1.MakeDirectoryResponse, error) {
		return c.MakeDirectory(t.Context(), &portalv1.MakeDirectoryRequest{Directory: path, Mode: mode})
	}
	path := filepath.Join(dir, "a/b/c")
	mode := uint32(0o3777)
	resp, err := mkdir(as("1:2", path), &mode)
	if err != nil || !resp.GetCreated() || resp.GetInfo().GetMode() != mode || string(resp.GetInfo().GetPath()) != path {
		t.Errorf("got %v, error %v", resp, err)
	}
	wantStat(t, path, mode, 1, 2)
	wantStat(t, filepath.Join(dir, "a/b"), 0o755, 1, 2)
	resp, err = mkdir(at(path), nil)
	if err != nil || resp.GetCreated() || resp.GetInfo().GetMode() != mode {
		t.Errorf("an existing directory: got %v, error %v", resp, err)
	}
	noError(t, os.Symlink(path, filepath.Join(dir, "link")))
	if resp, err = mkdir(at(filepath.Join(dir, "link")), nil); err != nil || resp.GetCreated() {
		t.Errorf("a link to a directory: got %v, error %v", resp, err)
	}
	if resp, err = mkdir(at("/"), nil); err != nil || resp.GetCreated() {
		t.Errorf("/: got %v, error %v", resp, err)
	}
	create(t, filepath.Join(dir, "file"), "", 0o600)
	noError(t, os.Symlink("missing", filepath.Join(dir, "dangling")))
	for _, name := range []string{"file", "file/x", "file/x/y", "dangling", "dangling/x"} {
		_, err = mkdir(at(filepath.Join(dir, name)), nil)
		wantError(t, name, err, codes.FailedPrecondition, "is not a directory")
	}
	mode = 0o10000
	_, err = mkdir(at(filepath.Join(dir, "mode")), &mode)
	wantError(t, "mode", err, codes.InvalidArgument, "07777")
}

func TestMoveFile(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	create(t, in("a"), "a", 0o640)
	noError(t, os.Chown(in("a"), 5, 6))
	resp, err := c.MoveFile(t.Context(), &portalv1.MoveFileRequest{Source: at(in("a")), Destination: as("1:2", in("p/q/b"))})
	if err != nil || string(resp.GetInfo().GetPath()) != in("p/q/b") || content(t, in("p/q/b")) != "a" {
		t.Errorf("got %v, error %v", resp, err)
	}
	wantStat(t, in("p/q"), 0o755, 1, 2)
	wantStat(t, in("p/q/b"), 0o640, 5, 6)
	create(t, in("c"), "c", 0o600)
	noError(t, c.move(t.Context(), in("c"), in("p/q/b")))
	if content(t, in("p/q/b")) != "c" {
		t.Error("the file was not replaced")
	}
	noError(t, os.Symlink("nowhere", in("link")))
	noError(t, c.move(t.Context(), in("link"), in("link2")))
	noError(t, os.Mkdir(in("empty"), 0o755))
	noError(t, c.move(t.Context(), in("p"), in("empty"))) // as rename(2)
	noError(t, c.move(t.Context(), in("empty"), in("p")))
	noError(t, c.move(t.Context(), in("p"), in("p")))

	create(t, in("file"), "", 0o600)
	noError(t, os.MkdirAll(in("d/sub"), 0o755))
	noError(t, os.Symlink("d", in("to-d")))
	for what, p := range map[string]struct {
		from, to string
		code     codes.Code
		text     string
	}{
		"missing":                  {"missing", "x/y", codes.NotFound, `missing" does not exist`},
		"directory below itself":   {"d", "d/sub/new/x", codes.InvalidArgument, "below itself"},
		"non-empty directory":      {"d", "p", codes.FailedPrecondition, "not empty"},
		"file to a directory":      {"file", "d", codes.FailedPrecondition, "is a directory"},
		"directory to a file":      {"d", "file", codes.FailedPrecondition, "is not a directory"},
		"below a file":             {"d", "file/x", codes.FailedPrecondition, "is not a directory"},
		"below itself with a link": {"d", "to-d/x", codes.InvalidArgument, "below itself"},
	} {
		wantError(t, what, c.move(t.Context(), in(p.from), in(p.to)), p.code, p.text)
	}
	wantError(t, "/", c.move(t.Context(), "/", in("root")), codes.InvalidArgument, "below itself")
	wantNames(t, dir, "d", "file", "link2", "p", "to-d")
	wantNames(t, in("d/sub"))
}

func TestRemoveFile(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	noError(t, os.MkdirAll(in("full/sub/deep"), 0o755))
	noError(t, os.Mkdir(in("empty"), 0o755))
	noError(t, os.Mkdir(in("kept"), 0o755))
	create(t, in("kept/file"), "", 0o600)
	create(t, in("full/sub/file"), "", 0)
	noError(t, os.Symlink("../kept", in("full/link")))
	noError(t, os.Symlink("kept", in("link")))
	create(t, in("file"), "", 0o600)

	wantError(t, "non-empty directory", c.remove(t.Context(), in("full"), false), codes.FailedPrecondition, "not empty")
	for _, recursive := range []bool{false, true} {
		wantError(t, "missing", c.remove(t.Context(), in("missing"), recursive), codes.NotFound, "does not exist")
	}
	// Not recursively, so that a defect removes nothing.
	wantError(t, "/", c.remove(t.Context(), "/../", false), codes.InvalidArgument, "root directory")
	wantError(t, "mount point", c.remove(t.Context(), "/proc", false), codes.FailedPrecondition, "/proc")
	noError(t, c.remove(t.Context(), in("file"), false))
	noError(t, c.remove(t.Context(), in("empty"), false))
	noError(t, c.remove(t.Context(), in("full"), true))
	noError(t, c.remove(t.Context(), in("link"), true))
	wantNames(t, dir, "kept")
	wantNames(t, in("kept"), "file")
}

// TestFilesOfPortalThatIsNotRoot uses a portal that runs as the user of its image.
func TestFilesOfPortalThatIsNotRoot(t *testing.T) {
	t.Parallel()
	if os.Getuid() != 0 {
		t.Skip("only root can start a process of another user")
	}
	c := startFiles(t, 65534)
	dir, err := os.MkdirTemp("", "msb-portal-test-*")
	noError(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	noError(t, os.Chown(dir, 65534, 65534))
	in := func(name string) string { return filepath.Join(dir, name) }

	_, err = c.write(t.Context(), &portalv1.WriteFileRequest_Start{File: as("nobody", in("d/file")), Mode: proto.Uint32(0o400), Xattrs: map[string][]byte{"user.x": nil}}, []byte("x"))
	noError(t, err)
	wantStat(t, in("d/file"), 0o400, 65534, 65534)
	_, err = c.write(t.Context(), &portalv1.WriteFileRequest_Start{File: at(in("d/file"))}, []byte("y"))
	noError(t, err)
	_, err = c.writeTree(t.Context(), at(in("tree")), false, tarOf(t,
		entry{Name: "ro/", Mode: 0o555}, entry{Name: "ro/file", Mode: 0o444, Uid: 1}, entry{Name: "closed/"}, entry{Name: "closed/sub/", Mode: 0o500},
	))
	noError(t, err)
	wantStat(t, in("tree/closed"), 0, 65534, 65534)
	wantStat(t, in("tree/closed/sub"), 0o500, 65534, 65534)
	wantStat(t, in("tree/ro"), 0o555, 65534, 65534)
	wantStat(t, in("tree/ro/file"), 0o444, 65534, 65534)

	_, err = c.write(t.Context(), &portalv1.WriteFileRequest_Start{File: as("root", in("x"))}, []byte("x"))
	wantError(t, "WriteFile as root", err, codes.FailedPrecondition, "cannot become user")
	_, err = c.writeTree(t.Context(), as("root", in("x")), false, tarOf(t))
	wantError(t, "WriteTree as root", err, codes.FailedPrecondition, "cannot become user")
	_, err = c.writeTree(t.Context(), at(in("x")), true, tarOf(t, entry{Name: "f", Uid: 1, Gid: 1}))
	wantError(t, "WriteTree with owners", err, codes.FailedPrecondition, "does not permit")
	_, err = c.MakeDirectory(t.Context(), &portalv1.MakeDirectoryRequest{Directory: as("root", in("x"))})
	wantError(t, "MakeDirectory as root", err, codes.FailedPrecondition, "cannot become user")
	_, err = c.MoveFile(t.Context(), &portalv1.MoveFileRequest{Source: at(in("d/file")), Destination: as("root", in("x"))})
	wantError(t, "MoveFile as root", err, codes.FailedPrecondition, "cannot become user")
	_, _, err = c.read(t.Context(), &portalv1.ReadFileRequest{File: at("/etc/shadow")})
	wantError(t, "ReadFile", err, codes.FailedPrecondition, "permission")
	wantError(t, "RemoveFile", c.remove(t.Context(), "/etc/passwd", false), codes.FailedPrecondition, "permission")
	_, err = c.list(t.Context(), "/root", 1)
	wantError(t, "ListFiles", err, codes.FailedPrecondition, "permission")
	noError(t, c.remove(t.Context(), in("d"), true))
}
