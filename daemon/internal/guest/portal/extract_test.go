package portal

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

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
		if _, err := extract(t.Context(), &archive, root, extractOptions{keepOwners: true}); err != nil {
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
