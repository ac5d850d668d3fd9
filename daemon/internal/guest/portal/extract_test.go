package portal

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
	"github.com/msbd/msbd/daemon/internal/sys/limit"
)

// directories writes an archive of n directories with the records.
func directories(w io.Writer, n int, records map[string]string) *tar.Writer {
	archive := tar.NewWriter(w)
	for i := range n {
		_ = archive.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: fmt.Sprintf("d%d/", i), Mode: 0o755, Format: tar.FormatPAX, PAXRecords: records})
	}
	return archive
}

// extract keeps of the header of a directory only what it sets in the end.
func TestExtractKeepsNoHeaders(t *testing.T) {
	const n = 100
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapAlloc)
	}
	archived, into := io.Pipe()
	before, growth := heap(), int64(0)
	go func() {
		archive := directories(into, n, map[string]string{"MSB.comment": strings.Repeat("x", 900<<10)})
		growth = heap() - before
		archive.Close()
		into.Close()
	}()
	budget := newTreeMemory()
	if entries, err := extract(t.Context(), budget, archived, t.TempDir(), extractOptions{}); err != nil || entries != n {
		t.Errorf("got %d entries, error %v, want %d", entries, err, n)
	}
	if growth > 16<<20 {
		t.Errorf("%d directories with headers of 900 KiB need %d MiB", n, growth>>20)
	}
	if held, _ := budget.Held(); held != 0 {
		t.Errorf("%d bytes are held in the end", held)
	}
}

// The attributes of 200,000 directories are within the limit.
func TestTreeMemoryIsEnough(t *testing.T) {
	name := strings.Repeat("n", 100)
	if size := 200_000 * (attributes{}).size(name); size > maxTreeMemory {
		t.Errorf("200,000 directories need %d MiB, but %d are the limit", size>>20, maxTreeMemory>>20)
	}
}

func TestExtractLimits(t *testing.T) {
	xattr := func(size int) map[string]string {
		return map[string]string{xattrRecord + "user.a": strings.Repeat("x", size)}
	}
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	for what, tt := range map[string]struct {
		ctx     context.Context
		archive func(w io.Writer) *tar.Writer
		code    codes.Code
		text    string
	}{
		"few directories": {archive: func(w io.Writer) *tar.Writer { return directories(w, 1000, nil) }},
		"many directories": {
			archive: func(w io.Writer) *tar.Writer { return directories(w, 10_000, nil) },
			code:    codes.ResourceExhausted, text: "more than the 1 MiB of memory",
		},
		"the same directory many times": {archive: func(w io.Writer) *tar.Writer {
			archive := tar.NewWriter(w)
			for range 10_000 {
				_ = archive.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "d/", Mode: 0o755})
			}
			return archive
		}},
		"a large header": {
			archive: func(w io.Writer) *tar.Writer {
				return directories(w, 1, map[string]string{"MSB.x": strings.Repeat("x", 100<<10)})
			},
			code: codes.ResourceExhausted, text: "more than the 1 MiB",
		},
		"large extended attributes": {
			archive: func(w io.Writer) *tar.Writer { return directories(w, 1, xattr(maxXattrs-10)) },
			code:    codes.ResourceExhausted, text: "more than the 1 MiB",
		},
		"many extended attributes": {
			archive: func(w io.Writer) *tar.Writer { return directories(w, 100, xattr(20<<10)) },
			code:    codes.ResourceExhausted, text: "more than the 1 MiB",
		},
		"a deep entry": {archive: func(w io.Writer) *tar.Writer {
			archive := tar.NewWriter(w)
			_ = archive.WriteHeader(&tar.Header{Name: strings.Repeat("d/", maxDepth-1) + "f"})
			return archive
		}},
		"an entry that is too deep": {
			archive: func(w io.Writer) *tar.Writer {
				archive := tar.NewWriter(w)
				_ = archive.WriteHeader(&tar.Header{Name: strings.Repeat("d/", maxDepth) + "f"})
				return archive
			},
			code: codes.InvalidArgument, text: "is in 1000 directories or more",
		},
		"a canceled call": {
			ctx:     canceled,
			archive: func(w io.Writer) *tar.Writer { return directories(w, 1, nil) },
			code:    codes.Canceled,
		},
	} {
		t.Run(what, func(t *testing.T) {
			var archive bytes.Buffer
			tt.archive(&archive).Close()
			ctx := t.Context()
			if tt.ctx != nil {
				ctx = tt.ctx
			}
			budget := limit.NewBudget(1<<20, 1<<20)
			_, err := extract(ctx, budget, &archive, t.TempDir(), extractOptions{})
			if status.Code(err) != tt.code || !strings.Contains(status.Convert(err).Message(), tt.text) {
				t.Errorf("got error %v, want %v with %q", err, tt.code, tt.text)
			}
			if held, _ := budget.Held(); held != 0 {
				t.Errorf("%d bytes are held in the end", held)
			}
		})
	}

	var archive bytes.Buffer
	directories(&archive, 1, xattr(maxXattrs)).Close()
	_, err := extract(t.Context(), newTreeMemory(), &archive, t.TempDir(), extractOptions{})
	if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "64 KiB of extended attributes") {
		t.Errorf("extended attributes of more than 64 KiB: got error %v", err)
	}
}

// FuzzExtract checks that no archive changes anything outside of its directory, and that every error is a status that
// the contract allows. The input has a line for each entry: its type, its name, a tab and its link.
func FuzzExtract(f *testing.F) {
	f.Add("5d/\n0d/f\n1h\td/f\n6fifo\n3device")
	f.Add("2l\t..\n0l/secret\n5l/x")
	f.Add("2l\t../secret\n1h\tl\n0h\n5l/")
	f.Add("5d\n2d/up\t..\n2e\td/up/..\n0e/secret\n1e/secret\tsecret\n5.\n0../secret\n0/secret")
	f.Fuzz(func(t *testing.T, entries string) {
		var archive bytes.Buffer
		w := tar.NewWriter(&archive)
		for line := range strings.SplitSeq(entries, "\n") {
			name, link, _ := strings.Cut(line, "\t")
			if name == "" {
				continue
			}
			hdr := &tar.Header{Typeflag: name[0], Name: name[1:], Linkname: link, Mode: 0o777, Uid: 1, Gid: 1}
			if hdr.Typeflag == tar.TypeReg {
				hdr.Size = 5
			}
			if w.WriteHeader(hdr) == nil {
				_, _ = w.Write(make([]byte, hdr.Size))
			}
		}
		if err := w.Close(); err != nil {
			return
		}
		dir := t.TempDir()
		root := filepath.Join(dir, "root")
		if err := os.Mkdir(root, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, "secret"), []byte("secret"), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := extract(t.Context(), newTreeMemory(), &archive, root, extractOptions{keepOwners: true}); err != nil {
			switch status.Code(fileError(root, err)) {
			case codes.InvalidArgument, codes.FailedPrecondition, codes.ResourceExhausted:
			default:
				t.Errorf("error %v", err)
			}
		}
		above, err := os.ReadDir(dir)
		if err != nil || len(above) != 2 {
			t.Errorf("the directory above has %v, error %v", above, err)
		}
		info, err := os.Lstat(filepath.Join(dir, "secret"))
		if err != nil || info.Mode() != 0o600 || info.Size() != 6 {
			t.Errorf("the file outside is %v, error %v", info, err)
		}
	})
}

// FuzzLocate checks that every path is refused or becomes an absolute, clean one.
func FuzzLocate(f *testing.F) {
	f.Add([]byte("~/x"), "/work", "")
	f.Add([]byte("a/../../b"), "", "root")
	f.Add([]byte("\xff\x00"), "relative", "1:2")
	f.Fuzz(func(t *testing.T, path []byte, workdir, user string) {
		loc, err := locate(&portalv1.FilePath{Path: path, Workdir: workdir, User: user})
		if err != nil {
			if status.Code(err) != codes.InvalidArgument {
				t.Errorf("error %v", err)
			}
			return
		}
		if !filepath.IsAbs(loc.path) || filepath.Clean(loc.path) != loc.path || strings.ContainsRune(loc.path, 0) {
			t.Errorf("got path %q", loc.path)
		}
	})
}
