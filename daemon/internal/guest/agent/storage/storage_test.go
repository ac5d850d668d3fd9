package storage

import (
	"slices"
	"testing"

	"github.com/containerd/errdefs"
)

func TestVirtiofsMounts(t *testing.T) {
	const mounts = "proc /proc proc rw 0 0\nkataShared /run/a\\040b virtiofs ro 0 0\nnone /run/c\\1 virtiofs rw 0 0\nshort\n"
	if got, want := virtiofsMounts(mounts), []string{"/run/a b", `/run/c\1`}; !slices.Equal(got, want) {
		t.Errorf("virtiofsMounts = %q, want %q", got, want)
	}
}

func TestRootRefusesPathsOutsideRun(t *testing.T) {
	for _, path := range []string{"", "x", "/", "/proc", "/run", "/run/../etc", "/run/x\x00"} {
		if root, err := NewSet().Root(t.Context(), path); !errdefs.IsInvalidArgument(err) {
			t.Errorf("Root(%q) = %q, %v; want errdefs.ErrInvalidArgument", path, root, err)
		}
	}
}
