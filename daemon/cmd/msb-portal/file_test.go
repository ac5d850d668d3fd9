package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
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

	// What can be removed is removed.
	noError(t, os.MkdirAll(in("mixed/closed"), 0o755))
	create(t, in("mixed/closed/file"), "", 0o600)
	for _, name := range []string{"a", "z"} {
		noError(t, os.Mkdir(in("mixed/"+name), 0o755))
		noError(t, os.Chown(in("mixed/"+name), 65534, 65534))
	}
	noError(t, os.Chown(in("mixed"), 65534, 65534))
	wantError(t, "RemoveFile of another user's file", c.remove(t.Context(), in("mixed"), true), codes.FailedPrecondition, "permission")
	wantNames(t, in("mixed"), "closed")
	wantNames(t, in("mixed/closed"), "file")
}
