package agent

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

func TestWriteResolvConf(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etc")
	if err := writeResolvConf(dir, nil); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("writeResolvConf without lines created the directory")
	}
	if err := writeResolvConf(dir, []string{"nameserver 192.0.2.1", "search example.org", "", ""}); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(dir + "/resolv.conf"); err != nil || string(got) != "nameserver 192.0.2.1\nsearch example.org\n" {
		t.Errorf("resolv.conf is %q, %v", got, err)
	}
	for _, bad := range [][]string{{"a\x00b"}, {string(make([]byte, maxDNS+1))}} {
		if err := writeResolvConf(dir, bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("writeResolvConf with a bad line of %d bytes: %v, want errdefs.ErrInvalidArgument", len(bad[0]), err)
		}
	}
}
