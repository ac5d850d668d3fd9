package client_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/msbd/msbd/client"
)

// writeTree writes a tree with everything that a tree may have.
func writeTree(t *testing.T, dir string) {
	t.Helper()
	for _, err := range []error{
		os.MkdirAll(dir+"/sub/empty", 0o755),
		os.WriteFile(dir+"/plain", []byte("hello\n"), 0o644),
		os.WriteFile(dir+"/sub/program", []byte("#!/bin/sh\n"), 0o755),
		os.WriteFile(dir+"/ leading space, \"quotes\" \n newline", []byte("odd"), 0o600),
		os.WriteFile(dir+"/\xff\xfe not UTF-8", []byte("bytes"), 0o640),
		os.WriteFile(dir+"/"+strings.Repeat("long", 60), nil, 0o444),
		os.WriteFile(dir+"/süß-日本", []byte("names"), 0o644),
		os.WriteFile(dir+"/-rf", nil, 0o644),
		os.Symlink("sub/program", dir+"/link"),
		os.Symlink("/nowhere/at all", dir+"/dangling"),
		os.Symlink("sub", dir+"/link to directory"),
		os.Link(dir+"/plain", dir+"/sub/second name"),
		os.Chmod(dir+"/sub", 0o500),
		os.Chtimes(dir+"/plain", time.Time{}, time.Unix(1_000_000_000, 500_000_000)),
		os.Chtimes(dir+"/sub", time.Time{}, time.Unix(1_100_000_000, 0)),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() { os.Chmod(dir+"/sub", 0o700) })
}

// describe returns a line for each entry of a tree.
func describe(t *testing.T, dir string) string {
	t.Helper()
	var out strings.Builder
	inodes := map[uint64]string{}
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		info, err := os.Lstat(path)
		if err != nil {
			return err
		}
		fmt.Fprintf(&out, "%q %s", strings.TrimPrefix(path, dir), info.Mode())
		switch {
		case info.Mode()&fs.ModeSymlink != 0:
			target, _ := os.Readlink(path)
			fmt.Fprintf(&out, " -> %q", target)
		case info.Mode().IsRegular():
			data, _ := os.ReadFile(path)
			fmt.Fprintf(&out, " %q", data)
			var st unix.Stat_t
			if err := unix.Lstat(path, &st); err != nil {
				return err
			}
			if first := inodes[st.Ino]; first != "" {
				fmt.Fprintf(&out, " = %q", first)
			} else {
				inodes[st.Ino] = strings.TrimPrefix(path, dir)
			}
		}
		if info.ModTime().Year() < 2020 {
			fmt.Fprintf(&out, " %s", info.ModTime().UTC().Format(time.RFC3339Nano))
		}
		out.WriteByte('\n')
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestUploadAndDownload(t *testing.T) {
	t.Parallel()
	s, home := startSandbox(t)
	ctx := t.Context()
	f := s.Files()
	local := t.TempDir()
	writeTree(t, local)
	if err := unix.Mkfifo(local+"/pipe", 0o600); err != nil {
		t.Fatal(err)
	}
	var copied int64
	var skipped []string
	options := client.CopyOptions{Progress: func(n int64) { copied = n }, Skipped: func(path string) { skipped = append(skipped, path) }}
	if err := f.Upload(ctx, local, "tree", options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Chmod(home+"/tree/sub", 0o700) })
	os.Remove(local + "/pipe")
	want := describe(t, local)
	if got := describe(t, home+"/tree"); got != want {
		t.Errorf("uploaded:\n%swant:\n%s", got, want)
	}
	if len(skipped) != 1 || skipped[0] != local+"/pipe" || copied == 0 {
		t.Errorf("skipped %q, copied %d bytes", skipped, copied)
	}
	back := filepath.Join(t.TempDir(), "back")
	copied = 0
	if err := f.Download(ctx, "tree", back, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Chmod(back+"/sub", 0o700) })
	if got := describe(t, back); got != want {
		t.Errorf("downloaded:\n%swant:\n%s", got, want)
	}
	if copied == 0 {
		t.Error("no progress")
	}

	// Files are replaced, and the others stay.
	if err := os.WriteFile(back+"/plain", []byte("changed"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(back+"/mine", nil, 0o600); err != nil {
		t.Fatal(err)
	}
	os.Chmod(back+"/sub", 0o700) // as root, this test could write into it all the same
	if err := f.Download(ctx, "tree", back, client.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(back + "/mine"); err != nil {
		t.Error(err)
	}
	if got := describe(t, back); got != want {
		t.Errorf("downloaded again:\n%swant:\n%s", got, want)
	}

	// A link in the place of the directory, which an earlier download may have made, is not followed.
	target := t.TempDir()
	if err := os.Symlink(target, back+".link"); err != nil {
		t.Fatal(err)
	}
	if err := f.Download(ctx, "tree", back+".link", client.CopyOptions{}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("download to a link: %v", err)
	}

	// Single files.
	if err := f.Upload(ctx, local+"/sub/program", "copy", client.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	if info, err := f.Stat(ctx, "copy"); err != nil || info.Mode != "0755" || info.Size != 10 {
		t.Errorf("got %+v, %v", info, err)
	}
	single := filepath.Join(t.TempDir(), "single")
	if err := f.Download(ctx, "tree/plain", single, client.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(single); err != nil || string(data) != "hello\n" {
		t.Errorf("got %q, %v", data, err)
	}
	for _, c := range []struct {
		err  error
		want error
	}{
		{f.Upload(ctx, local+"/nothing", "x", client.CopyOptions{}), fs.ErrNotExist},
		{f.Upload(ctx, "/dev/null", "x", client.CopyOptions{}), errdefs.ErrInvalidArgument},
		{f.Download(ctx, "nothing", single, client.CopyOptions{}), errdefs.ErrNotFound},
		{f.Download(ctx, "tree/plain", local, client.CopyOptions{}), errdefs.ErrInvalidArgument},
		{f.Download(ctx, "tree/plain", "/no/such/directory/file", client.CopyOptions{}), fs.ErrNotExist},
		{f.Upload(ctx, local, "copy", client.CopyOptions{}), errdefs.ErrConflict}, // a file
	} {
		if !errors.Is(c.err, c.want) {
			t.Errorf("got %v, want %v", c.err, c.want)
		}
	}
}

// Nothing that a sandbox sends is written outside of the directory.
func TestHostileArchives(t *testing.T) {
	t.Parallel()
	file := func(name string) []*tar.Header {
		return []*tar.Header{{Name: name, Typeflag: tar.TypeReg, Mode: 0o4777, Size: 4}}
	}
	dir := &tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755}
	link := func(name, target string) *tar.Header {
		return &tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target}
	}
	for name, headers := range map[string][]*tar.Header{
		"parent":                      append([]*tar.Header{dir}, file("./../victim")...),
		"absolute":                    append([]*tar.Header{dir}, file("/victim")...),
		"link to parent":              append([]*tar.Header{dir, link("./l", "..")}, file("./l/victim")...),
		"link to a file":              append([]*tar.Header{dir, link("./l", "../victim")}, file("./l")...),
		"link to absolute":            append([]*tar.Header{dir, link("./l", "OUTSIDE")}, file("./l/victim")...),
		"hard link":                   append([]*tar.Header{dir, {Name: "./l", Typeflag: tar.TypeLink, Linkname: "../victim"}}, file("./l")...),
		"hard link to an old file":    {dir, {Name: "./m", Typeflag: tar.TypeLink, Linkname: "./old"}},
		"only a link":                 {link("l", "victim")},
		"only a hard link":            {{Name: "l", Typeflag: tar.TypeLink, Linkname: "victim"}},
		"hard link over a link":       {dir, link("./l", ".."), {Name: "./m", Typeflag: tar.TypeLink, Linkname: "./l/victim"}},
		"directory over a link":       append([]*tar.Header{dir, link("./l", ".."), {Name: "./l", Typeflag: tar.TypeDir, Mode: 0o777}}, file("./l/victim")...),
		"device":                      {dir, {Name: "./d", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}},
		"file with the name of a dir": {dir, {Name: "./a", Typeflag: tar.TypeDir, Mode: 0o700}, {Name: "./a/b", Typeflag: tar.TypeDir, Mode: 0o700}, file("./a")[0]},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			outside := t.TempDir()
			if err := os.WriteFile(outside+"/victim", []byte("safe"), 0o600); err != nil {
				t.Fatal(err)
			}
			before := describe(t, outside)
			var archive bytes.Buffer
			w := tar.NewWriter(&archive)
			for _, h := range headers {
				h := *h
				h.Linkname = strings.ReplaceAll(h.Linkname, "OUTSIDE", outside)
				if err := w.WriteHeader(&h); err != nil {
					t.Fatal(err)
				}
				if h.Size > 0 {
					io.WriteString(w, "evil")
				}
			}
			w.Close()
			server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
				rw.Header().Set("X-Request-Id", "A")
				rw.Header().Set("Content-Type", "application/x-tar")
				rw.Write(archive.Bytes())
			}))
			defer server.Close()
			inside := filepath.Join(outside, "inside")
			if name == "hard link to an old file" {
				if err := errors.Join(os.Mkdir(inside, 0o700), os.WriteFile(inside+"/old", nil, 0o600)); err != nil {
					t.Fatal(err)
				}
			}
			err := (&client.Client{ServerURL: server.URL}).Sandbox("", "a").Files().Download(t.Context(), "x", inside, client.CopyOptions{})
			if err == nil && name != "device" && name != "link to a file" {
				t.Errorf("extracted")
			}
			tree := ""
			if _, err := os.Stat(inside); err == nil {
				tree = describe(t, inside)
			}
			if strings.Contains(tree, ".msb-") || strings.Contains(tree, "u--") || strings.Contains(tree, "D") {
				t.Errorf("left %s", tree)
			}
			if err := os.RemoveAll(inside); err != nil {
				t.Fatal(err)
			}
			if after := describe(t, outside); after != before {
				t.Errorf("before:\n%safter:\n%s", before, after)
			}
		})
	}
}

// An archive that breaks off is an error.
func TestIncompleteArchive(t *testing.T) {
	t.Parallel()
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	w.WriteHeader(&tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755})
	w.WriteHeader(&tar.Header{Name: "./a", Typeflag: tar.TypeReg, Mode: 0o644, Size: 2000})
	w.Write(make([]byte, 2000))
	w.Flush()
	for _, length := range []int{0, 100, 1100, 2500} {
		server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, _ *http.Request) {
			rw.Header().Set("X-Request-Id", "A")
			rw.Write(archive.Bytes()[:length])
		}))
		local := filepath.Join(t.TempDir(), "x")
		err := (&client.Client{ServerURL: server.URL}).Sandbox("", "a").Files().Download(t.Context(), "x", local, client.CopyOptions{})
		server.Close()
		if !errdefs.IsUnavailable(err) {
			t.Errorf("%d bytes: got %v", length, err)
		}
		if entries, _ := os.ReadDir(local); len(entries) > 0 {
			t.Errorf("%d bytes: left %v", length, entries)
		}
	}
}
