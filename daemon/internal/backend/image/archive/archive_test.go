package archive_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/msbd/msbd/daemon/internal/backend/image/archive"
)

var (
	epoch = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	older = epoch.Add(-time.Hour)
)

func rootfs(t *testing.T, headers ...tar.Header) io.Reader {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range headers {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(bytes.Repeat([]byte("x"), int(h.Size))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &buf
}

func write(t *testing.T, r io.Reader) ([]byte, digest.Digest) {
	t.Helper()
	var buf bytes.Buffer
	d, err := archive.Write(&buf, r, archive.Image{
		Name:         "docker.io/a/b:latest",
		Architecture: "amd64",
		Created:      epoch,
		Config:       ocispec.ImageConfig{Env: []string{"A=b"}, Cmd: []string{"sh"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return buf.Bytes(), d
}

func TestEqualTreesGiveEqualArchives(t *testing.T) {
	const mode = 0o755
	one, d1 := write(t, rootfs(t,
		tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: mode, ModTime: epoch.Add(time.Hour)},
		tar.Header{Name: "./made", Mode: mode, Size: 5, ModTime: epoch.Add(time.Hour), Uname: "root", AccessTime: epoch, Format: tar.FormatPAX},
		tar.Header{Name: "./shipped", Mode: mode, ModTime: older},
		tar.Header{Name: "./dev/null", Typeflag: tar.TypeChar, Mode: mode, Devmajor: 1, Devminor: 3},
	))
	two, d2 := write(t, rootfs(t,
		tar.Header{Name: "made", Mode: mode, Size: 5, ModTime: epoch.Add(99 * time.Hour), Gname: "wheel"},
		tar.Header{Name: "shipped", Mode: mode, ModTime: older.Add(500 * time.Millisecond), Format: tar.FormatPAX},
	))
	if d1 != d2 || !bytes.Equal(one, two) {
		t.Errorf("archives of equal trees differ: digests %s and %s", d1, d2)
	}
	_, d3 := write(t, rootfs(t, tar.Header{Name: "made", Mode: 0o700, Size: 5}))
	if d3 == d1 {
		t.Error("a different tree has the same digest")
	}
}

func TestArchiveHasTree(t *testing.T) {
	capability := map[string]string{"SCHILY.xattr.security.capability": "cap"}
	data, d := write(t, rootfs(t,
		tar.Header{Name: "./bin/", Typeflag: tar.TypeDir, Mode: 0o755, ModTime: older},
		tar.Header{Name: "./bin/su", Mode: 0o4755, Size: 3, Uid: 1, Gid: 2, ModTime: older, PAXRecords: capability},
		tar.Header{Name: "./bin/sh", Typeflag: tar.TypeSymlink, Linkname: "su", ModTime: older},
		tar.Header{Name: "./bin/hard", Typeflag: tar.TypeLink, Linkname: "./bin/su", ModTime: older},
	))

	files := map[string][]byte{}
	r := tar.NewReader(bytes.NewReader(data))
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	// Check each blob against the digest in its name.
	blob := func(d ocispec.Descriptor) []byte {
		data := files["blobs/sha256/"+d.Digest.Encoded()]
		if digest.FromBytes(data) != d.Digest || int64(len(data)) != d.Size {
			t.Fatalf("blob %s has the wrong digest or size", d.Digest)
		}
		return data
	}
	decode := func(data []byte, v any) {
		if err := json.Unmarshal(data, v); err != nil {
			t.Fatal(err)
		}
	}
	var index ocispec.Index
	var manifest ocispec.Manifest
	var config ocispec.Image
	decode(files["index.json"], &index)
	if len(index.Manifests) != 1 || index.Manifests[0].Digest != d || index.Manifests[0].Annotations["io.containerd.image.name"] != "docker.io/a/b:latest" {
		t.Errorf("index %s", files["index.json"])
	}
	decode(blob(index.Manifests[0]), &manifest)
	decode(blob(manifest.Config), &config)
	if config.Architecture != "amd64" || !cmp.Equal(config.Config.Cmd, []string{"sh"}) {
		t.Errorf("config %+v", config)
	}
	z, err := zstd.NewReader(bytes.NewReader(blob(manifest.Layers[0])))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	layer, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	if got := config.RootFS.DiffIDs; len(got) != 1 || got[0] != digest.FromBytes(layer) {
		t.Errorf("diff ids %v", got)
	}

	type entry struct {
		Name, Link string
		Mode       int64
		UID, GID   int
		Cap        string
	}
	var got []entry
	r = tar.NewReader(bytes.NewReader(layer))
	for {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if !h.ModTime.Equal(older) {
			t.Errorf("%s has the date %s, want %s", h.Name, h.ModTime, older)
		}
		got = append(got, entry{h.Name, h.Linkname, h.Mode, h.Uid, h.Gid, h.PAXRecords["SCHILY.xattr.security.capability"]})
	}
	want := []entry{
		{Name: "bin/", Mode: 0o755},
		{Name: "bin/su", Mode: 0o4755, UID: 1, GID: 2, Cap: "cap"},
		{Name: "bin/sh", Link: "su"},
		{Name: "bin/hard", Link: "bin/su"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestWriteRejectsBrokenTrees(t *testing.T) {
	broken := errors.New("mmdebstrap died")
	for name, r := range map[string]io.Reader{
		"empty":   rootfs(t),
		"garbage": bytes.NewReader(bytes.Repeat([]byte{1}, 1024)),
		"cut":     io.MultiReader(io.LimitReader(rootfs(t, tar.Header{Name: "f", Size: 5000}), 2000), errReader{broken}),
	} {
		if _, err := archive.Write(io.Discard, r, archive.Image{Name: "docker.io/a/b:latest", Created: epoch}); err == nil {
			t.Errorf("%s: no error", name)
		} else if name == "cut" && !errors.Is(err, broken) {
			t.Errorf("%s: error %v, want it to wrap %v", name, err, broken)
		}
	}
}

// errReader is a reader that always fails.
type errReader struct{ err error }

func (r errReader) Read([]byte) (int, error) { return 0, r.err }
