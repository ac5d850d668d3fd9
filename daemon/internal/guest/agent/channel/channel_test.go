package channel

import (
	"os"
	"path/filepath"
	"testing"
)

func TestFindPort(t *testing.T) {
	sysfs := t.TempDir()
	for port, name := range map[string]string{"vport1p1": "msb.0", "vport1p2": portName} {
		if err := os.Mkdir(filepath.Join(sysfs, port), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(sysfs, port, "name"), []byte(name+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := findPort(sysfs, portName, 0, 0); err != nil || got != "vport1p2" {
		t.Errorf("findPort(%q) = %q, %v; want vport1p2", portName, got, err)
	}
	if got, err := findPort(sysfs, "absent", 0, 0); err == nil {
		t.Errorf("findPort for a port that does not exist = %q, want an error", got)
	}
}
