package store

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

// FuzzReadKeys checks that ReadKeys, which reads files from backups, survives any content, and that its errors are
// classified.
func FuzzReadKeys(f *testing.F) {
	old, err := os.ReadFile("testdata/schema1/msb.db")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(old)
	dir := f.TempDir()
	s := open(f, dir)
	if err := addKey(s, keyRecord("a")); err != nil {
		f.Fatal(err)
	}
	if err := s.Close(); err != nil {
		f.Fatal(err)
	}
	now, err := os.ReadFile(filepath.Join(dir, fileName))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(now)
	f.Add(now[:len(now)/2])
	f.Add([]byte{})
	path := filepath.Join(f.TempDir(), "db")
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := ReadKeys(path); err != nil && !errdefs.IsDataLoss(err) && !errdefs.IsFailedPrecondition(err) {
			t.Fatalf("ReadKeys: %v, want data loss or failed precondition", err)
		}
	})
}
