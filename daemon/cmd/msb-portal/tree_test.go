package main

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// entry is an entry of an archive for a test. The zero Type is that of a regular file, or of a directory if the name
// ends in "/".
type entry struct {
	Type     byte
	Name     string
	Link     string
	Mode     int64
	Uid, Gid int
	data     string
}

// tarOf returns an archive with these entries.
func tarOf(t testing.TB, entries ...entry) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		if e.Type == 0 && strings.HasSuffix(e.Name, "/") {
			e.Type = tar.TypeDir
		}
		hdr := &tar.Header{
			Typeflag: e.Type, Name: e.Name, Linkname: e.Link, Mode: e.Mode, Uid: e.Uid, Gid: e.Gid,
			Size: int64(len(e.data)), ModTime: time.Unix(1000, 0),
		}
		if e.Type == tar.TypeXGlobalHeader {
			hdr = &tar.Header{Typeflag: e.Type, PAXRecords: map[string]string{"comment": e.Name}}
		}
		noError(t, w.WriteHeader(hdr))
		_, err := w.Write([]byte(e.data))
		noError(t, err)
	}
	noError(t, w.Close())
	return b.Bytes()
}

func (c files) readTree(ctx context.Context, path string) ([]byte, error) {
	resps, err := all(c.ReadTree(ctx, &portalv1.ReadTreeRequest{Root: at(path)}))
	var archive []byte
	for _, r := range resps {
		if n := len(r.GetData()); n == 0 || n > 64<<10 {
			return nil, fmt.Errorf("a message has %d bytes", n)
		}
		archive = append(archive, r.GetData()...)
	}
	return archive, err
}

// writeTree sends an archive in several messages.
func (c files) writeTree(ctx context.Context, dir *portalv1.FilePath, keepOwners bool, archive []byte) (uint64, error) {
	stream, err := c.WriteTree(ctx)
	if err != nil {
		return 0, err
	}
	// If a Send fails, CloseAndRecv returns why.
	err = stream.Send(&portalv1.WriteTreeRequest{Part: &portalv1.WriteTreeRequest_Start_{
		Start: &portalv1.WriteTreeRequest_Start{Directory: dir, KeepOwners: keepOwners},
	}})
	for piece := range slices.Chunk(archive, 50_001) {
		if err == nil {
			err = stream.Send(&portalv1.WriteTreeRequest{Part: &portalv1.WriteTreeRequest_Data{Data: piece}})
		}
	}
	resp, err := stream.CloseAndRecv()
	return resp.GetEntries(), err
}

// makeTree creates a tree with all that an archive can describe.
func makeTree(t testing.TB, root string) {
	t.Helper()
	in := func(name string) string { return filepath.Join(root, name) }
	for _, d := range []string{"empty", "a/b/c", "odd", "read-only", "private"} {
		noError(t, os.MkdirAll(in(d), 0o755))
	}
	create(t, in("file"), strings.Repeat("data\x00", 40_000), 0o644)
	create(t, in("a/b/c/setuid"), "x", 0o600)
	noError(t, os.Chown(in("a/b/c/setuid"), 3, 4_000_000))
	noError(t, unix.Chmod(in("a/b/c/setuid"), 0o6755))
	create(t, in("a/empty"), "", 0)
	noError(t, os.Link(in("file"), in("a/hard")))
	noError(t, os.Link(in("file"), in("z-hard")))
	noError(t, os.Symlink("../file", in("a/link")))
	noError(t, os.Symlink("/nowhere\xff", in("dangling")))
	noError(t, os.Lchown(in("dangling"), 7, 8))
	for _, name := range oddNames {
		create(t, in("odd/"+name), name, 0o600)
	}
	noError(t, os.MkdirAll(in("long/"+strings.Repeat(strings.Repeat("n", 100)+"/", 10)), 0o755))
	create(t, in("read-only/file"), "x", 0o444)
	noError(t, unix.Chmod(in("read-only"), 0o555))
	noError(t, unix.Chmod(in("private"), 0o1700))
	noError(t, os.Chown(in("private"), 9, 10))
	for name, value := range map[string]string{"user.plain": "v", "user.odd=%3D": "a\x00b\nc=d", "user.long": strings.Repeat("v", 3000)} {
		noError(t, unix.Setxattr(in("file"), name, []byte(value), 0))
	}
	noError(t, unix.Setxattr(in("empty"), "user.dir", []byte("v"), 0))
	noError(t, os.Chtimes(in("a/empty"), time.Unix(-1000, 5), time.Unix(-1000, 5)))
	noError(t, os.Chtimes(in("empty"), time.Unix(5e9, 5), time.Unix(5e9, 5)))
}

// snapshot describes everything in a tree by the paths in it.
func snapshot(t testing.TB, root string) map[string]string {
	t.Helper()
	files := make(map[string]string)
	firstNames := make(map[uint64]string)
	noError(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, err error) error {
		noError(t, err)
		rel, err := filepath.Rel(root, path)
		noError(t, err)
		st := lstat(t, path)
		what := fmt.Sprintf("mode %#o owner %d:%d time %d.%d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFLNK:
			target, err := os.Readlink(path)
			noError(t, err)
			what += fmt.Sprintf(" target %q", target)
		case unix.S_IFREG:
			if _, ok := firstNames[st.Ino]; !ok {
				firstNames[st.Ino] = rel
			}
			what += fmt.Sprintf(" first link %q content %q", firstNames[st.Ino], content(t, path))
			fallthrough
		case unix.S_IFDIR:
			names := make([]byte, 64<<10)
			n, err := unix.Listxattr(path, names)
			noError(t, err)
			attrs := strings.Split(string(names[:n]), "\x00")
			slices.Sort(attrs)
			for _, name := range attrs {
				if name != "" {
					value := make([]byte, 64<<10)
					n, err := unix.Getxattr(path, name, value)
					noError(t, err)
					what += fmt.Sprintf(" %q=%q", name, value[:n])
				}
			}
		}
		files[rel] = what
		return nil
	}))
	return files
}

func wantTree(t testing.TB, got string, want map[string]string) {
	t.Helper()
	if diff := cmp.Diff(want, snapshot(t, got)); diff != "" {
		t.Errorf("%s differs (-want +got):\n%s", got, diff)
	}
}

// gnuTar runs GNU tar.
func gnuTar(t testing.TB, in []byte, args ...string) []byte {
	t.Helper()
	cmd := exec.Command("tar", append([]string{"--xattrs", "--xattrs-include=user.*", "--numeric-owner", "--warning=no-timestamp"}, args...)...)
	cmd.Stdin = bytes.NewReader(in)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil || stderr.Len() > 0 {
		t.Fatalf("tar %q: %v: %s", args, err, &stderr)
	}
	return out
}

func TestTrees(t *testing.T) {
	t.Parallel()
	c, root := startFiles(t, 0), t.TempDir()
	makeTree(t, root)
	want := snapshot(t, root)

	archive, err := c.readTree(t.Context(), root)
	noError(t, err)
	t.Run("the portal extracts what it archived", func(t *testing.T) {
		out := filepath.Join(t.TempDir(), "new/out")
		n, err := c.writeTree(t.Context(), at(out), true, archive)
		if err != nil || n != uint64(len(want)) {
			t.Errorf("got %d entries, error %v, want %d", n, err, len(want))
		}
		wantTree(t, out, want)
		// A second time, the files are replaced.
		_, err = c.writeTree(t.Context(), at(out), true, archive)
		noError(t, err)
		noError(t, os.Chtimes(out, time.Time{}, time.Unix(unix.TimespecToNsec(lstat(t, root).Mtim)/1e9, unix.TimespecToNsec(lstat(t, root).Mtim)%1e9)))
		wantTree(t, out, want)
	})
	t.Run("GNU tar extracts what the portal archived", func(t *testing.T) {
		out := t.TempDir()
		gnuTar(t, archive, "-C", out, "-xpf", "-")
		wantTree(t, out, want)
	})
	t.Run("the portal extracts what GNU tar archived", func(t *testing.T) {
		out := filepath.Join(t.TempDir(), "out")
		_, err := c.writeTree(t.Context(), at(out), true, gnuTar(t, nil, "--format=pax", "-C", root, "-cf", "-", "."))
		noError(t, err)
		wantTree(t, out, want)
	})
	t.Run("another user", func(t *testing.T) {
		out := filepath.Join(t.TempDir(), "out")
		_, err := c.writeTree(t.Context(), as("11:12", out), false, archive)
		noError(t, err)
		noError(t, filepath.WalkDir(out, func(path string, _ fs.DirEntry, err error) error {
			if st := lstat(t, path); st.Uid != 11 || st.Gid != 12 {
				t.Errorf("%q has the owner %d:%d, want 11:12", path, st.Uid, st.Gid)
			}
			return err
		}))
		wantStat(t, filepath.Join(out, "a/b/c/setuid"), 0o6755, 11, 12)
	})
}

// TestTreesOfOtherFormats extracts archives in the other formats of GNU tar.
func TestTreesOfOtherFormats(t *testing.T) {
	t.Parallel()
	c, root := startFiles(t, 0), t.TempDir()
	noError(t, os.MkdirAll(filepath.Join(root, "dir/"+strings.Repeat("n", 90)+"/"+strings.Repeat("m", 90)), 0o750))
	create(t, filepath.Join(root, "dir/file"), "data", 0o640)
	sparse, err := os.Create(filepath.Join(root, "sparse"))
	noError(t, err)
	for _, offset := range []int64{1 << 20, 3 << 20} {
		_, err = sparse.WriteAt([]byte("data"), offset)
		noError(t, err)
	}
	noError(t, sparse.Truncate(5<<20))
	noError(t, sparse.Close())
	noError(t, filepath.WalkDir(root, func(path string, _ fs.DirEntry, _ error) error {
		return os.Chtimes(path, time.Time{}, time.Unix(1e9, 0)) // other formats have only seconds
	}))
	want := snapshot(t, root)
	for _, args := range [][]string{{"--format=gnu"}, {"--format=ustar"}, {"--format=gnu", "-S"}, {"--format=pax", "-S"}, {"--format=pax", "-S", "--sparse-version=0.1"}} {
		cmd := exec.Command("tar", append(args, "-C", root, "-cf", "-", ".")...)
		archive, err := cmd.Output()
		noError(t, err)
		out := filepath.Join(t.TempDir(), "out")
		if _, err := c.writeTree(t.Context(), at(out), true, archive); err != nil {
			t.Errorf("%q: %v", args, err)
			continue
		}
		wantTree(t, out, want)
	}
}

func TestReadTree(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	names := func(path string) string {
		t.Helper()
		archive, err := c.readTree(t.Context(), path)
		noError(t, err)
		var names []string
		r := tar.NewReader(bytes.NewReader(archive))
		for {
			hdr, err := r.Next()
			if err != nil {
				return strings.Join(names, " ")
			}
			if hdr.Format != tar.FormatPAX && hdr.Format != tar.FormatUSTAR {
				t.Errorf("%s has the format %v", hdr.Name, hdr.Format)
			}
			if hdr.Uname != "root" || hdr.Gname != "root" {
				t.Errorf("%s belongs to %s:%s", hdr.Name, hdr.Uname, hdr.Gname)
			}
			names = append(names, hdr.Name)
		}
	}
	noError(t, os.Mkdir(filepath.Join(dir, "tree"), 0o755))
	create(t, filepath.Join(dir, "tree/file"), "x", 0o600)
	noError(t, unix.Mkfifo(filepath.Join(dir, "tree/fifo"), 0o600))
	lis, err := net.Listen("unix", filepath.Join(dir, "tree/socket"))
	noError(t, err)
	defer lis.Close()
	noError(t, unix.Mknod(filepath.Join(dir, "tree/null"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	noError(t, os.Symlink("tree", filepath.Join(dir, "link")))
	noError(t, os.Symlink("tree/file", filepath.Join(dir, "file-link")))
	noError(t, os.Symlink("/etc", filepath.Join(dir, "tree/etc")))
	for path, want := range map[string]string{
		"tree": "./ ./etc ./file", "link": "./ ./etc ./file", "tree/file": "file", "file-link": "file-link",
	} {
		if got := names(filepath.Join(dir, path)); got != want {
			t.Errorf("%s: got %s, want %s", path, got, want)
		}
	}
	// The kernel generates what is in it.
	if got := names("/proc"); got != "./" {
		t.Errorf("/proc: got %s", got)
	}
	_, err = c.readTree(t.Context(), filepath.Join(dir, "missing"))
	wantError(t, "missing", err, codes.NotFound, "does not exist")
	_, err = c.readTree(t.Context(), filepath.Join(dir, "tree/fifo"))
	wantError(t, "pipe", err, codes.FailedPrecondition, "neither")
}

// TestReadTreeThatChanges changes files while they are in the archive's future: the connection takes less than the first.
func TestReadTreeThatChanges(t *testing.T) {
	t.Parallel()
	c := startFiles(t, 0)
	for _, p := range []struct {
		change func(dir string) error
		text   string
	}{
		{func(dir string) error { return os.Remove(filepath.Join(dir, "b")) }, ""},
		{func(dir string) error { return os.Truncate(filepath.Join(dir, "a"), 1<<20) }, `a" changed while it was read`},
	} {
		dir := t.TempDir()
		for _, name := range []string{"a", "b"} {
			create(t, filepath.Join(dir, name), "", 0o600)
			noError(t, os.Truncate(filepath.Join(dir, name), 64<<20))
		}
		stream, err := c.ReadTree(t.Context(), &portalv1.ReadTreeRequest{Root: at(dir)})
		noError(t, err)
		_, err = stream.Recv()
		noError(t, err)
		noError(t, p.change(dir))
		n := 0
		for err == nil {
			var resp *portalv1.ReadTreeResponse
			resp, err = stream.Recv()
			n += len(resp.GetData())
		}
		if p.text != "" {
			wantError(t, "a file that shrinks", err, codes.FailedPrecondition, p.text)
		} else if n > 65<<20 {
			t.Errorf("a file that vanishes: got %d bytes, error %v", n, err)
		}
	}
}

// TestLargeXattrs has attributes of the size that a message may have.
func TestLargeXattrs(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), mountTmpfs(t, 1<<20)
	file := filepath.Join(dir, "tree", strings.Repeat("\xff", 200))
	noError(t, os.Mkdir(filepath.Dir(file), 0o755))
	create(t, file, "", 0o600)
	noError(t, unix.Setxattr(file, "user.large", bytes.Repeat([]byte("v"), 65_500), 0))
	if got := c.stat(t, file).GetXattrs(); len(got["user.large"]) != 65_500 {
		t.Errorf("got %d bytes", len(got["user.large"]))
	}
	want := snapshot(t, filepath.Dir(file))
	archive, err := c.readTree(t.Context(), filepath.Dir(file))
	noError(t, err)
	_, err = c.writeTree(t.Context(), at(filepath.Join(dir, "copy")), true, archive)
	noError(t, err)
	wantTree(t, filepath.Join(dir, "copy"), want)

	noError(t, unix.Setxattr(file, "user.more", bytes.Repeat([]byte("v"), 100), 0))
	_, err = c.StatFile(t.Context(), &portalv1.StatFileRequest{File: at(file), Xattrs: true})
	wantError(t, "StatFile", err, codes.FailedPrecondition, "more than 64 KiB")
	_, err = c.readTree(t.Context(), filepath.Dir(file))
	wantError(t, "ReadTree", err, codes.FailedPrecondition, "more than 64 KiB")
}

// TestDeepTree has a path that is longer than the kernel accepts in one call.
func TestDeepTree(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	root, err := os.OpenRoot(dir)
	noError(t, err)
	defer root.Close()
	deep := strings.Repeat(strings.Repeat("d", 200)+"/", 30)
	noError(t, root.MkdirAll("in/"+deep, 0o755))
	noError(t, root.WriteFile("in/"+deep+"file", []byte("deep"), 0o600))
	archive, err := c.readTree(t.Context(), filepath.Join(dir, "in"))
	noError(t, err)
	_, err = c.writeTree(t.Context(), at(filepath.Join(dir, "out")), false, archive)
	noError(t, err)
	if got, err := root.ReadFile("out/" + deep + "file"); err != nil || string(got) != "deep" {
		t.Errorf("got %q, error %v", got, err)
	}
	if got, err := c.list(t.Context(), dir, 100); err != nil || len(got) != 2*32 {
		t.Errorf("got %d files, error %v", len(got), err)
	}
	noError(t, c.remove(t.Context(), filepath.Join(dir, "in"), true))

	_, err = c.writeTree(t.Context(), at(filepath.Join(dir, "out")), false, tarOf(t, entry{Name: strings.Repeat("d/", 10_000)}))
	wantError(t, "a very deep entry", err, codes.InvalidArgument, "too long")
}

func TestWriteTree(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	outside := t.TempDir()
	create(t, filepath.Join(outside, "secret"), "secret", 0o600)
	noError(t, os.Mkdir(in("kept"), 0o700))
	create(t, in("kept/file"), "kept", 0o600)
	create(t, in("replaced"), "old", 0o600)
	noError(t, os.Link(in("replaced"), in("other-link")))
	noError(t, os.Symlink(outside+"/secret", in("link-to-file")))
	noError(t, os.Symlink(outside, in("link-to-dir")))
	create(t, in("file-to-dir"), "", 0o600)
	noError(t, unix.Chmod(dir, 0o1777))

	_, err := c.writeTree(t.Context(), at(dir), false, nil)
	wantError(t, "nothing", err, codes.InvalidArgument, "no end")
	n, err := c.writeTree(t.Context(), as("1", dir), false, tarOf(t,
		entry{Type: tar.TypeXGlobalHeader, Name: "comment"},
		entry{Name: "./", Mode: 0o700},
		entry{Name: "kept/", Mode: 0o711, Uid: 5},
		entry{Name: "replaced", Mode: 0o644, data: "new"},
		entry{Name: "link-to-file", Mode: 0o644, data: "new"},
		entry{Name: "link-to-dir/", Mode: 0o755},
		entry{Name: "link-to-dir/file", Mode: 0o644, data: "inside"},
		entry{Name: "file-to-dir/", Mode: 0o750},
		entry{Name: "implied/sub/../dir/file", Mode: 0o644},
		entry{Name: "fifo", Type: tar.TypeFifo, Mode: 0o622},
		entry{Name: "hard", Type: tar.TypeLink, Link: "./replaced"},
		entry{Name: "hard", Type: tar.TypeLink, Link: "hard"},
	))
	if err != nil || n != 11 {
		t.Fatalf("got %d entries, error %v", n, err)
	}
	wantStat(t, dir, 0o1777, 0, 0) // the directory existed
	wantStat(t, in("kept"), 0o711, 0, 0)
	if content(t, in("kept/file")) != "kept" || content(t, in("other-link")) != "old" || content(t, in("hard")) != "new" {
		t.Error("a file was changed that is not in the archive")
	}
	wantStat(t, in("replaced"), 0o644, 1, 1)
	wantStat(t, in("file-to-dir"), 0o750, 1, 1)
	wantStat(t, in("link-to-dir"), 0o755, 1, 1)
	wantStat(t, in("implied/dir"), 0o755, 1, 1)
	wantStat(t, in("implied"), 0o755, 1, 1)
	wantStat(t, in("fifo"), 0o622, 1, 1)
	if lstat(t, in("fifo")).Mode&unix.S_IFMT != unix.S_IFIFO || lstat(t, in("hard")).Ino != lstat(t, in("replaced")).Ino {
		t.Error("the pipe or the hard link is none")
	}
	wantNames(t, outside, "secret")
	if content(t, filepath.Join(outside, "secret")) != "secret" {
		t.Error("a file outside was changed")
	}
}

// A file that exists is replaced in one step. An archive that breaks off leaves the earlier file and no other one.
func TestReplacedFiles(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	replaced := filepath.Join(dir, "replaced")
	create(t, replaced, "old", 0o600)
	opened, err := os.Open(replaced)
	noError(t, err)
	defer opened.Close()
	archive := tarOf(t, entry{Name: "replaced", Mode: 0o644, data: strings.Repeat("new", 10_000)})
	_, err = c.writeTree(t.Context(), at(dir), false, archive[:8<<10])
	wantError(t, "half of an archive", err, codes.InvalidArgument, "complete")
	if got := content(t, replaced); got != "old" {
		t.Errorf("the file has %.10q after half of an archive, want what it had", got)
	}
	wantNames(t, dir, "replaced")
	_, err = c.writeTree(t.Context(), at(dir), false, archive)
	noError(t, err)
	if rest, err := io.ReadAll(opened); err != nil || string(rest) != "old" || len(content(t, replaced)) != 30_000 {
		t.Errorf("a program that had opened the file reads %q, %v, and the file has %d bytes", rest, err, len(content(t, replaced)))
	}
}

// TestHostileArchives checks that no archive leads out of the directory, and which entries are refused.
func TestHostileArchives(t *testing.T) {
	t.Parallel()
	c := startFiles(t, 0)
	outside := t.TempDir()
	create(t, filepath.Join(outside, "secret"), "secret", 0o600)
	want := snapshot(t, outside)
	complete := tarOf(t, entry{Name: "d/", Mode: 0o755}, entry{Name: "d/file", data: strings.Repeat("x", 3000)}, entry{Name: "last"})
	corrupt := slices.Clone(complete)
	corrupt[512+10] ^= 1
	var gz bytes.Buffer
	gz.Write([]byte{0x1f, 0x8b, 8, 0})
	cases := []struct {
		what    string
		archive []byte
		code    codes.Code
		text    string
	}{
		{"parent", tarOf(t, entry{Name: "../x"}), codes.InvalidArgument, `"../x"`},
		{"parent in between", tarOf(t, entry{Name: "a/../../x"}), codes.InvalidArgument, `"a/../../x"`},
		{"only parent", tarOf(t, entry{Name: "../"}), codes.InvalidArgument, `"../"`},
		{"absolute", tarOf(t, entry{Name: outside + "/x"}), codes.InvalidArgument, outside},
		{"root as a file", tarOf(t, entry{Name: "."}), codes.InvalidArgument, "is not a directory"},
		{"root as a link", tarOf(t, entry{Name: "./", Type: tar.TypeSymlink, Link: outside}), codes.InvalidArgument, "is not a directory"},
		{"absolute link", tarOf(t, entry{Name: "l", Type: tar.TypeSymlink, Link: outside}, entry{Name: "l/x"}), codes.InvalidArgument, `"l/x"`},
		{"relative link", tarOf(t, entry{Name: "l", Type: tar.TypeSymlink, Link: "../.."}, entry{Name: "l/x/y/"}), codes.InvalidArgument, `"l/x/y/"`},
		{"two links", tarOf(t, entry{Name: "d/", Mode: 0o755}, entry{Name: "d/l", Type: tar.TypeSymlink, Link: ".."},
			entry{Name: "m", Type: tar.TypeSymlink, Link: "d/l/.."}, entry{Name: "m/x"}), codes.InvalidArgument, `"m/x"`},
		{"link in place of a directory", tarOf(t, entry{Name: "d/", Mode: 0o755}, entry{Name: "d", Type: tar.TypeSymlink, Link: outside},
			entry{Name: "d/x"}), codes.FailedPrecondition, "is a directory"},
		{"hard link outside", tarOf(t, entry{Name: "h", Type: tar.TypeLink, Link: "../secret"}), codes.InvalidArgument, `"h"`},
		{"absolute hard link", tarOf(t, entry{Name: "h", Type: tar.TypeLink, Link: outside + "/secret"}), codes.InvalidArgument, `"h"`},
		{"hard link through a link", tarOf(t, entry{Name: "l", Type: tar.TypeSymlink, Link: outside},
			entry{Name: "h", Type: tar.TypeLink, Link: "l/secret"}), codes.InvalidArgument, `"h"`},
		{"hard link to nothing", tarOf(t, entry{Name: "h", Type: tar.TypeLink, Link: "missing"}), codes.InvalidArgument, `"missing"`},
		{"hard link to a link", tarOf(t, entry{Name: "l", Type: tar.TypeSymlink, Link: outside + "/secret"},
			entry{Name: "h", Type: tar.TypeLink, Link: "l"}, entry{Name: "h", data: "new"}, entry{Name: "l", data: "new"}), codes.OK, ""},
		{"mode through a link", tarOf(t, entry{Name: "d/", Mode: 0o777}, entry{Name: "l", Type: tar.TypeSymlink, Link: outside},
			entry{Name: "l/", Mode: 0o777, Uid: 5}), codes.OK, ""},
		{"link to nothing", tarOf(t, entry{Name: "l", Type: tar.TypeSymlink}), codes.InvalidArgument, `"l"`},
		{"device", tarOf(t, entry{Name: "null", Type: tar.TypeChar}), codes.InvalidArgument, `"null" of the archive is a device`},
		{"disk", tarOf(t, entry{Name: "sda", Type: tar.TypeBlock}), codes.InvalidArgument, `"sda" of the archive is a device`},
		{"owner", tarOf(t, entry{Name: "f", Uid: 1<<32 - 1}), codes.InvalidArgument, `"f" of the archive has an owner`},
		{"long name", tarOf(t, entry{Name: strings.Repeat("x", 256)}), codes.InvalidArgument, "too long"},
		{"file as a directory", tarOf(t, entry{Name: "f"}, entry{Name: "f/x"}), codes.FailedPrecondition, "is not a directory"},
		{"gzip", gz.Bytes(), codes.InvalidArgument, "gzip"},
		{"text", bytes.Repeat([]byte("text "), 1000), codes.InvalidArgument, "not a complete tar archive"},
		{"corrupt", corrupt, codes.InvalidArgument, "not a complete tar archive"},
		{"zero block in between", slices.Concat(make([]byte, 512), complete), codes.InvalidArgument, "not a complete tar archive"},
		{"data after the end", slices.Concat(complete, bytes.Repeat([]byte("x"), 100_000)), codes.OK, ""},
	}
	for _, p := range cases {
		dir := t.TempDir()
		_, err := c.writeTree(t.Context(), at(filepath.Join(dir, "root")), true, p.archive)
		wantError(t, p.what, err, p.code, p.text)
		wantNames(t, dir, "root")
	}
	// The last 1024 bytes are the end of the archive.
	for n := 0; n < len(complete); n += 256 {
		_, err := c.writeTree(t.Context(), at(t.TempDir()), true, complete[:n])
		wantError(t, fmt.Sprintf("the first %d of %d bytes", n, len(complete)), err, codes.InvalidArgument, "complete")
	}
	wantTree(t, outside, want)

	stream, err := c.WriteTree(t.Context())
	noError(t, err)
	noError(t, stream.Send(&portalv1.WriteTreeRequest{Part: &portalv1.WriteTreeRequest_Data{Data: complete}}))
	_, err = stream.CloseAndRecv()
	wantError(t, "no start", err, codes.InvalidArgument, "start")
}

// TestMoveToAnotherFileSystem moves files and trees between two file systems.
func TestMoveToAnotherFileSystem(t *testing.T) {
	t.Parallel()
	c, dir, other := startFiles(t, 0), t.TempDir(), mountTmpfs(t, 16<<20)
	in := func(name string) string { return filepath.Join(dir, name) }
	source, destination := in("tree"), filepath.Join(other, "new/tree")
	noError(t, os.Mkdir(source, 0o750))
	makeTree(t, source)
	noError(t, unix.Mkfifo(filepath.Join(source, "fifo"), 0o620))
	want := snapshot(t, source)
	noError(t, c.move(t.Context(), source, destination))
	wantTree(t, destination, want)
	wantNames(t, dir)
	noError(t, c.move(t.Context(), destination, source))
	wantTree(t, source, want)
	wantNames(t, filepath.Join(other, "new"))

	create(t, in("file"), "new", 0o4711)
	create(t, filepath.Join(other, "file"), "old", 0o600)
	noError(t, os.Symlink("file", in("link")))
	noError(t, c.move(t.Context(), in("file"), filepath.Join(other, "file")))
	wantStat(t, filepath.Join(other, "file"), 0o4711, 0, 0)
	noError(t, c.move(t.Context(), in("link"), filepath.Join(other, "link")))
	if content(t, filepath.Join(other, "link")) != "new" || lstat(t, filepath.Join(other, "link")).Mode&unix.S_IFMT != unix.S_IFLNK {
		t.Error("the link was not moved")
	}

	// These moves fail, and change nothing.
	wantError(t, "to a directory that is not empty", c.move(t.Context(), source, filepath.Join(other)), codes.FailedPrecondition, "")
	noError(t, os.MkdirAll(filepath.Join(other, "full/x"), 0o755))
	wantError(t, "to a directory that is not empty", c.move(t.Context(), source, filepath.Join(other, "full")), codes.FailedPrecondition, "not empty")
	lis, err := net.Listen("unix", filepath.Join(source, "socket"))
	noError(t, err)
	defer lis.Close()
	want = snapshot(t, source)
	wantError(t, "with a socket", c.move(t.Context(), source, filepath.Join(other, "x")), codes.FailedPrecondition, "is a socket")
	wantTree(t, source, want)
	wantNames(t, other, "file", "full", "link", "new")
}
