package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// changes are the events of a watch.
type changes struct {
	t      testing.TB
	infos  bool
	stream grpc.ServerStreamingClient[portalv1.WatchFilesResponse]
}

// watch starts to watch files.
func (c files) watch(t testing.TB, req *portalv1.WatchFilesRequest) changes {
	t.Helper()
	stream, err := c.WatchFiles(t.Context(), req)
	noError(t, err)
	e := changes{t, req.GetInfos(), stream}
	if got := e.next(); got != "STARTED " {
		t.Fatalf("the first event is %s", got)
	}
	return e
}

// next returns the next event as "TYPE path", or its error.
func (e changes) next() string {
	e.t.Helper()
	resp, err := e.stream.Recv()
	if err != nil {
		return err.Error()
	}
	if resp.GetInfo() != nil && !e.infos {
		e.t.Errorf("got %v, which was not requested", resp.GetInfo())
	}
	return strings.TrimPrefix(resp.GetType().String(), "TYPE_") + " " + string(resp.GetPath())
}

// want checks the next events. Of an event that comes several times in a row, it expects one.
func (e changes) want(want ...string) {
	e.t.Helper()
	last := ""
	for _, w := range want {
		got := e.next()
		for got == last {
			got = e.next()
		}
		if got != w {
			e.t.Fatalf("got event %q, want %q", got, w)
		}
		last = got
	}
}

// until returns the events before the one about the path end.
func (e changes) until(end string) []string {
	e.t.Helper()
	var all []string
	for {
		event := e.next()
		if event == "CREATE "+end {
			return all
		}
		if strings.HasPrefix(event, "rpc error") {
			e.t.Fatalf("got %s after %q", event, all)
		}
		all = append(all, event)
	}
}

func TestWatchFiles(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	noError(t, os.Mkdir(in("old"), 0o755))
	e := c.watch(t, &portalv1.WatchFilesRequest{Path: at(dir), Recursive: true})
	create(t, in("a\n\xff"), "x", 0o600)
	e.want("CREATE a\n\xff", "WRITE a\n\xff", "CHMOD a\n\xff")
	noError(t, os.Rename(in("a\n\xff"), in("old/b")))
	e.want("RENAME a\n\xff", "CREATE old/b")
	noError(t, os.Remove(in("old/b")))
	e.want("REMOVE old/b")
	noError(t, os.Symlink("/etc", in("link")))
	e.want("CREATE link")
	noError(t, os.Chmod(dir, 0o700))
	e.want("CHMOD ")

	// A directory keeps being watched when it is moved.
	noError(t, os.MkdirAll(in("old/sub"), 0o755))
	e.want("CREATE old/sub")
	noError(t, os.Rename(in("old"), in("new")))
	e.want("RENAME old", "CREATE new", "CREATE new/sub")
	create(t, in("new/sub/file"), "", 0o600)
	e.want("CREATE new/sub/file", "CHMOD new/sub/file")
	elsewhere := filepath.Join(t.TempDir(), "gone")
	noError(t, os.Rename(in("new"), elsewhere))
	e.want("RENAME new")
	create(t, filepath.Join(elsewhere, "sub/unseen"), "", 0o600)
	noError(t, os.Rename(elsewhere, in("back")))
	e.want("CREATE back", "CREATE back/sub", "CREATE back/sub/file", "CREATE back/sub/unseen")
	noError(t, os.RemoveAll(in("back")))
	e.want("REMOVE back/sub/file")
	// The directory sub is open while its entries are removed, so the order of the rest depends on the system.
	for event := e.next(); event != "REMOVE back"; event = e.next() {
		if !strings.HasPrefix(event, "REMOVE back/sub") {
			t.Fatalf("got event %s", event)
		}
	}

	noError(t, os.RemoveAll(dir))
	e.want("REMOVE link", "REMOVE ")
	if got := e.next(); !strings.Contains(got, "NotFound") || !strings.Contains(got, "was removed") {
		t.Errorf("the end is %s", got)
	}
}

func TestWatchWithoutSubdirectories(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	noError(t, os.Symlink(dir, dir+"-link"))
	t.Cleanup(func() { os.Remove(dir + "-link") })
	e := c.watch(t, &portalv1.WatchFilesRequest{Path: at(dir + "-link")})
	noError(t, os.MkdirAll(filepath.Join(dir, "a/b"), 0o755))
	create(t, filepath.Join(dir, "a/b/unseen"), "", 0o600)
	create(t, filepath.Join(dir, "z"), "", 0o600)
	e.want("CREATE a", "CREATE z")
	noError(t, os.Rename(dir, dir+"-moved"))
	t.Cleanup(func() { os.RemoveAll(dir + "-moved") })
	e.want("CHMOD z", "RENAME ")
	if got := e.next(); !strings.Contains(got, "was moved") {
		t.Errorf("the end is %s", got)
	}
}

// TestWatchHidesUploads checks that the file that the portal writes before it replaces another is not reported.
func TestWatchHidesUploads(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	events := c.watch(t, &portalv1.WatchFilesRequest{Path: at(dir)})
	for range 2 {
		_, err := c.write(t.Context(), &portalv1.WriteFileRequest_Start{File: at(filepath.Join(dir, "file"))}, []byte("new"))
		noError(t, err)
		events.want("CREATE file")
	}
}

func TestWatchOneFile(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	create(t, in("file"), "old", 0o600)
	noError(t, os.Symlink("file", in("link")))
	e := c.watch(t, &portalv1.WatchFilesRequest{Path: at(in("file")), Recursive: true, Infos: true})
	l := c.watch(t, &portalv1.WatchFilesRequest{Path: at(in("link"))})
	create(t, in("other"), "new", 0o640)
	noError(t, os.Rename(in("other"), in("file")))
	resp, err := e.stream.Recv()
	if err != nil || resp.GetType() != portalv1.WatchFilesResponse_TYPE_CREATE || len(resp.GetPath()) != 0 ||
		resp.GetInfo().GetMode() != 0o640 || string(resp.GetInfo().GetPath()) != in("file") {
		t.Errorf("got %v, error %v", resp, err)
	}
	f, err := os.OpenFile(in("file"), os.O_WRONLY, 0)
	noError(t, err)
	_, err = f.WriteString("x")
	noError(t, err)
	noError(t, f.Close())
	e.want("WRITE ")
	l.want("CREATE ", "WRITE ")
	// As an editor does.
	noError(t, os.Rename(in("file"), in("file~")))
	create(t, in("file"), "newer", 0o600)
	e.want("RENAME ", "CREATE ", "WRITE ", "CHMOD ")
	noError(t, os.Remove(in("file")))
	e.want("REMOVE ")
	if got := e.next(); !strings.Contains(got, "NotFound") || !strings.Contains(got, "was removed") {
		t.Errorf("the end is %s", got)
	}
}

func TestWatchInfos(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	e := c.watch(t, &portalv1.WatchFilesRequest{Path: at(dir), Infos: true})
	noError(t, os.Mkdir(filepath.Join(dir, "d"), 0o711))
	resp, err := e.stream.Recv()
	if err != nil || resp.GetInfo().GetMode() != 0o711 || string(resp.GetInfo().GetPath()) != dir+"/d" {
		t.Errorf("got %v, error %v", resp, err)
	}
	noError(t, os.Remove(filepath.Join(dir, "d")))
	if resp, err = e.stream.Recv(); err != nil || resp.GetInfo() != nil {
		t.Errorf("got %v, error %v", resp, err)
	}
}

// TestWatchNewTrees creates trees faster than the portal can watch their directories.
func TestWatchNewTrees(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	e := c.watch(t, &portalv1.WatchFilesRequest{Path: at(dir), Recursive: true})
	var want []string
	for i := range 200 {
		for _, p := range []string{"", "/a", "/a/b", "/a/b/c", "/a/b/c/f"} {
			want = append(want, fmt.Sprintf("CREATE %03d%s", i, p))
		}
	}
	cmd := exec.Command("sh", "-c", `for i in $(seq -w 0 199); do
		mkdir -p $i/a/b/c && : > $i/a/b/c/f
		mkdir -p gone/$i/a && rm -r gone
	done; : > end`)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got := slices.DeleteFunc(e.until("end"), func(event string) bool { return strings.Contains(event, " gone") })
	slices.Sort(got)
	// A file is visible a moment before its event is in the kernel's queue, so a few may come twice.
	if doubles := len(got) - len(slices.Compact(slices.Clone(got))); doubles > len(want)/10 {
		t.Errorf("%d of %d events came twice", doubles, len(want))
	}
	if got = slices.Compact(got); !slices.Equal(got, want) {
		t.Errorf("got %d events, want %d: %q", len(got), len(want), got)
	}
	// Everything is watched by now.
	create(t, filepath.Join(dir, "199/a/b/c/g"), "", 0o600)
	e.want("CREATE 199/a/b/c/g")
}

// TestWatchOverflow makes more changes than the kernel keeps while the client does not read.
func TestWatchOverflow(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	e := c.watch(t, &portalv1.WatchFilesRequest{Path: at(dir), Recursive: true})
	limit, err := strconv.Atoi(strings.TrimSpace(content(t, "/proc/sys/fs/inotify/max_queued_events")))
	noError(t, err)
	// Each name is two events. The connection takes a part of them.
	names := [2]string{filepath.Join(dir, strings.Repeat("x", 200)), filepath.Join(dir, strings.Repeat("y", 200))}
	create(t, names[0], "", 0o600)
	for i := range limit/2 + 4<<20/400 {
		noError(t, os.Rename(names[i%2], names[1-i%2]))
	}
	noError(t, os.MkdirAll(filepath.Join(dir, "new/sub"), 0o700))
	for event := e.next(); event != "OVERFLOW "; event = e.next() {
		if strings.HasPrefix(event, "rpc error") {
			t.Fatal(event)
		}
	}
	// The directories whose events were lost are watched.
	create(t, filepath.Join(dir, "new/sub/file"), "", 0o600)
	for event := e.next(); event != "CREATE new/sub/file"; event = e.next() {
		if strings.HasPrefix(event, "rpc error") {
			t.Fatal(event)
		}
	}
}

func TestWatchLimits(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var streams []grpc.ServerStreamingClient[portalv1.WatchFilesResponse]
	for range 64 {
		stream, err := c.WatchFiles(ctx, &portalv1.WatchFilesRequest{Path: at(dir)})
		noError(t, err)
		_, err = stream.Recv()
		noError(t, err)
		streams = append(streams, stream)
	}
	_, err := all(c.WatchFiles(t.Context(), &portalv1.WatchFilesRequest{Path: at(dir)}))
	wantError(t, "65 watches", err, codes.ResourceExhausted, "64")
	// A call ends at the portal after the client has got the end.
	noError(t, os.RemoveAll(dir))
	for _, stream := range streams {
		_, err = stream.Recv()
		for err == nil {
			_, err = stream.Recv()
		}
		wantError(t, "the directory is removed", err, codes.NotFound, "was removed")
	}

	many := t.TempDir()
	for i := range 8191 {
		noError(t, os.Mkdir(filepath.Join(many, fmt.Sprint(i)), 0o700))
	}
	e := c.watch(t, &portalv1.WatchFilesRequest{Path: at(many), Recursive: true})
	noError(t, os.Mkdir(filepath.Join(many, "one more"), 0o700))
	e.want("CREATE one more")
	if got := e.next(); !strings.Contains(got, "ResourceExhausted") || !strings.Contains(got, "8192") {
		t.Errorf("the end is %s", got)
	}
	_, err = all(c.WatchFiles(t.Context(), &portalv1.WatchFilesRequest{Path: at(many), Recursive: true}))
	wantError(t, "8193 directories", err, codes.ResourceExhausted, "8192")
	_, err = all(c.WatchFiles(t.Context(), &portalv1.WatchFilesRequest{Path: at(dir)}))
	wantError(t, "missing", err, codes.NotFound, "does not exist")
}
