package portal

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"bin/tool": 0o755, "other/tool": 0o755, "other/data": 0o644, "bin/deep/x": 0o755} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	bin, other := filepath.Join(dir, "bin"), filepath.Join(dir, "other")
	for _, tt := range []struct {
		name, path, workdir string
		want                string
		wantErr             string
	}{
		{name: "tool", path: bin + ":" + other, want: bin + "/tool"},
		{name: "tool", path: other + ":" + bin, want: other + "/tool"},
		{name: "tool", path: "/nonexistent:" + other, want: other + "/tool"},
		{name: "tool", path: "bin", workdir: dir, want: bin + "/tool"},
		{name: "tool", path: "", workdir: bin, wantErr: `program "tool" not found in PATH ()`},
		{name: "tool", path: ":", workdir: bin, want: bin + "/tool"},
		{name: "nope", path: bin, wantErr: `program "nope" not found in PATH (` + bin + ")"},
		{name: "data", path: bin + ":" + other, wantErr: "is not executable"},
		{name: "deep", path: bin, wantErr: "is a directory"},
		{name: "deep/x", path: "", workdir: bin, want: bin + "/deep/x"},
		{name: "./tool", path: "", workdir: bin, want: bin + "/tool"},
		{name: bin + "/tool", path: "", want: bin + "/tool"},
		{name: bin + "/nope", path: "", wantErr: "not found"},
		{name: bin + "/tool/x", path: "", wantErr: "not found"},
	} {
		got, err := lookPath(tt.name, []string{"PATH=" + tt.path}, tt.workdir)
		if tt.wantErr != "" {
			if err == nil || !strings.Contains(err.Error(), tt.wantErr) {
				t.Errorf("lookPath(%q, PATH=%s) = %q, %v; want an error containing %q", tt.name, tt.path, got, err, tt.wantErr)
			}
			continue
		}
		if err != nil || got != tt.want {
			t.Errorf("lookPath(%q, PATH=%s) = %q, %v; want %q", tt.name, tt.path, got, err, tt.want)
		}
	}
}
