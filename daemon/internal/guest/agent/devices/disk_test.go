package devices

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

func TestDiskGlob(t *testing.T) {
	got, err := diskGlob("02/0a")
	if want := "/sys/devices/pci0000:00/0000:*:02.0/0000:*:0a.0/virtio*/block/*"; err != nil || got != want {
		t.Errorf("diskGlob(%q) = %q, %v; want %q", "02/0a", got, err, want)
	}
	for _, bad := range []string{"", "2", "02/", "../x", "0G", "002", "20", "02.1"} {
		if _, err := diskGlob(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("diskGlob(%q): %v, want errdefs.ErrInvalidArgument", bad, err)
		}
	}
}

func TestDiskWithSerial(t *testing.T) {
	sysfs := t.TempDir()
	for name, serial := range map[string]string{"vda": "", "vdb": "msb-upper2\n", "vdc": "msb-upper", "vdd": "msb-image\n"} {
		if err := os.Mkdir(filepath.Join(sysfs, name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(sysfs, name, "serial"), []byte(serial), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(sysfs, "loop0"), 0o755); err != nil { // a disk without a serial number
		t.Fatal(err)
	}
	for serial, want := range map[string]string{"msb-upper": "vdc", "msb-image": "vdd", "msb": ""} {
		if got, ok := diskWithSerial(sysfs, serial); got != want || ok != (want != "") {
			t.Errorf("diskWithSerial(%q) = %q, %v; want %q", serial, got, ok, want)
		}
	}
}

func FuzzDiskGlob(f *testing.F) {
	for _, path := range []string{"02/01", "1e/0a/01", "", "../../x", "*/01"} {
		f.Add(path)
	}
	f.Fuzz(func(t *testing.T, path string) {
		glob, err := diskGlob(path)
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("diskGlob(%q): %v, want errdefs.ErrInvalidArgument", path, err)
		}
		if err == nil && strings.Contains(glob, "..") {
			t.Errorf("diskGlob(%q) = %q, which leaves /sys/devices", path, glob)
		}
	})
}
