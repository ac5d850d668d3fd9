package kata

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/containerd"
	"github.com/containerd/containerd/containers"
	"github.com/containerd/containerd/content"
	"github.com/containerd/containerd/namespaces"
	"github.com/containerd/containerd/oci"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

// emptyImage is an image with a configuration that says nothing.
type emptyImage struct{ containerd.Image }

func (emptyImage) ContentStore() content.Store { return nil }

func (emptyImage) Config(context.Context) (v1.Descriptor, error) {
	data := []byte(`{"architecture":"amd64","os":"linux"}`)
	return v1.Descriptor{MediaType: v1.MediaTypeImageConfig, Digest: digest.FromBytes(data), Size: int64(len(data)), Data: data}, nil
}

// No set of the container's capabilities has CAP_NET_RAW, with which root in a sandbox could pretend to be the host. The
// others are containerd's defaults.
func TestCapabilities(t *testing.T) {
	r, _ := newTestRuntime(t)
	root := t.TempDir()
	writeFile(t, filepath.Join(root, "etc/passwd"), "root:x:0:0::/root:/bin/sh\n")
	if err := os.Chmod(root, 0o755); err != nil {
		t.Fatal(err)
	}
	ctx := namespaces.WithNamespace(t.Context(), "test")
	container := &containers.Container{ID: "sandbox"}
	spec, err := oci.GenerateSpec(ctx, nil, container)
	if err != nil {
		t.Fatal(err)
	}
	spec.Root.Path = root
	defaults := slices.Clone(spec.Process.Capabilities.Bounding)
	if err := oci.ApplyOpts(ctx, nil, container, spec, r.spec("sandbox", sandbox.Template{CPUs: 1, MemoryMiB: 512}, "", emptyImage{})...); err != nil {
		t.Fatal(err)
	}
	want := slices.DeleteFunc(defaults, func(c string) bool { return c == "CAP_NET_RAW" })
	c := spec.Process.Capabilities
	for name, got := range map[string][]string{"bounding": c.Bounding, "effective": c.Effective, "permitted": c.Permitted} {
		if !slices.Equal(got, want) || len(want) != 13 {
			t.Errorf("%s: %q, want the 13 capabilities %q", name, got, want)
		}
	}
	if len(c.Inheritable)+len(c.Ambient) > 0 {
		t.Errorf("inheritable %q, ambient %q, want none", c.Inheritable, c.Ambient)
	}
}
