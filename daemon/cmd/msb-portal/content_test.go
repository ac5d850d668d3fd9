package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

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

// awaitEvents begins to watch the files in dir for the events in mask. The returned function waits for the next one of those
// that are in its mask.
func awaitEvents(t testing.TB, dir string, mask uint32) (await func(mask uint32)) {
	t.Helper()
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC)
	noError(t, err)
	t.Cleanup(func() { unix.Close(fd) })
	_, err = unix.InotifyAddWatch(fd, dir, mask)
	noError(t, err)
	buf, rest := make([]byte, 4<<10), []byte(nil)
	return func(mask uint32) {
		t.Helper()
		for {
			if len(rest) == 0 {
				n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 30_000)
				if err == unix.EINTR {
					continue
				}
				if err != nil || n == 0 {
					t.Fatalf("no event %#x within 30 s: %v", mask, err)
				}
				n, err = unix.Read(fd, buf)
				noError(t, err)
				rest = buf[:n]
			}
			got, size := binary.NativeEndian.Uint32(rest[4:]), unix.SizeofInotifyEvent+binary.NativeEndian.Uint32(rest[12:])
			rest = rest[size:]
			if got&mask != 0 {
				return
			}
		}
	}
}

// TestWriteFileCanceled cancels a call after its data is in a temporary file.
func TestWriteFileCanceled(t *testing.T) {
	t.Parallel()
	c, dir := startFiles(t, 0), t.TempDir()
	create(t, filepath.Join(dir, "file"), "old", 0o600)
	await := awaitEvents(t, dir, unix.IN_MODIFY|unix.IN_DELETE)
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := c.WriteFile(ctx)
	noError(t, err)
	noError(t, stream.Send(&portalv1.WriteFileRequest{Part: &portalv1.WriteFileRequest_Start_{
		Start: &portalv1.WriteFileRequest_Start{File: at(filepath.Join(dir, "file"))},
	}}))
	noError(t, stream.Send(&portalv1.WriteFileRequest{Part: &portalv1.WriteFileRequest_Data{Data: []byte("new")}}))
	await(unix.IN_MODIFY) // the data is in a temporary file
	cancel()
	await(unix.IN_DELETE)
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
