package agent

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

func TestReserveHugePages(t *testing.T) {
	sysfs := t.TempDir()
	file := filepath.Join(sysfs, "hugepages-2048kB", "nr_hugepages")
	if err := os.Mkdir(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("3\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := reserveHugePages(sysfs, []string{"pagesize=2097152,size=8388608", "uid=0"}); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(file); err != nil || string(got) != "7" {
		t.Errorf("%q pages, %v: what others have reserved stays", got, err)
	}
	for _, bad := range []string{"", "pagesize=2097152", "size=1", "pagesize=0,size=1", "pagesize=2M,size=4M", "pagesize=2097152,size=1"} {
		if err := reserveHugePages(sysfs, []string{bad}); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: %v", bad, err)
		}
	}
	if err := reserveHugePages(sysfs, []string{"pagesize=1073741824,size=1073741824"}); !os.IsNotExist(err) && err == nil {
		t.Error("pages of a size that the machine does not have")
	}
}

func TestWriteResolvConf(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "etc")
	if err := writeResolvConf(dir, nil); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(dir); err == nil {
		t.Error("no lines made a file")
	}
	if err := writeResolvConf(dir, []string{"nameserver 192.0.2.1", "search example.org", "", ""}); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(dir + "/resolv.conf"); err != nil || string(got) != "nameserver 192.0.2.1\nsearch example.org\n" {
		t.Errorf("%q, %v", got, err)
	}
	for _, bad := range [][]string{{"a\x00b"}, {string(make([]byte, maxDNS+1))}} {
		if err := writeResolvConf(dir, bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%d bytes: %v", len(bad[0]), err)
		}
	}
}
