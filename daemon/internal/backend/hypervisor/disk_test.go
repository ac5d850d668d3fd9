package hypervisor

import (
	"crypto/rand"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/guest/portalclient"
)

// checkDrives compares the limits of the disks of VM id with want.
func (h *testService) checkDrives(t *testing.T, id string, want driveLimits) {
	t.Helper()
	monitor, err := dialMonitor(t.Context(), filepath.Join(h.dir(id), monitorSocket))
	if err != nil {
		t.Fatal(err)
	}
	defer monitor.close()
	var drives []struct {
		Device   string
		Inserted driveLimits
	}
	if err := monitor.execute("query-block", nil, &drives); err != nil {
		t.Fatal(err)
	}
	limits := map[string]driveLimits{}
	for _, d := range drives {
		limits[d.Device] = d.Inserted
	}
	if diff := cmp.Diff(map[string]driveLimits{"image": want, "upper": want}, limits); diff != "" {
		t.Errorf("the limits of the disks: %s", diff)
	}
}

// driveLimits are limits as QEMU reports them.
type driveLimits struct {
	Group         string
	BPS, IOPS     int
	BPSMax        int `json:"bps_max"`
	BPSMaxLength  int `json:"bps_max_length"`
	IOPSMax       int `json:"iops_max"`
	IOPSMaxLength int `json:"iops_max_length"`
}

const mib = 1 << 20

// The disks of a VM together are held to the limit. Meanwhile the guest answers, and what it frees does not count.
func TestDiskLimit(t *testing.T) {
	cfg := newConfig(t)
	cfg.DiskMiBPerSecond, cfg.DiskOpsPerSecond = 1, 100
	h, _ := startService(t, cfg)
	const size = 6 * mib
	program, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	busybox, err := os.ReadFile(program)
	if err != nil {
		t.Fatal(err)
	}
	data := make([]byte, size)
	rand.Read(data)
	root := filepath.Join(filepath.Dir(cfg.Dir), "root") // of makeDisks
	if err := os.MkdirAll(root, 0o755); err != nil {
		t.Fatal(err)
	}
	writeFile(t, filepath.Join(root, "busybox"), string(busybox))
	writeFile(t, filepath.Join(root, "data"), string(data))
	if err := os.Chmod(filepath.Join(root, "busybox"), 0o755); err != nil {
		t.Fatal(err)
	}
	id := newVM(t, cfg)
	h.startSandbox(t, diskSpec(t, cfg, id))

	h.checkDrives(t, id, driveLimits{
		Group: "disks", BPS: mib, BPSMax: 2 * mib, BPSMaxLength: 10, IOPS: 100, IOPSMax: 200, IOPSMaxLength: 10,
	})

	conn, err := h.DialPortal(t.Context(), id, "")
	if err != nil {
		t.Fatal(err)
	}
	portal, err := portalclient.New(t.Context(), conn, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer portal.Close()
	// start starts a command of busybox, and wait waits for its end.
	start := func(args ...string) sandbox.Process {
		t.Helper()
		p, err := portal.RunCommand(t.Context(), sandbox.Command{Program: "/busybox", Args: args, Timeout: bootTimeout})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { p.Close() })
		return p
	}
	wait := func(p sandbox.Process) {
		t.Helper()
		var text []byte
		for {
			event, err := p.Next()
			if err != nil {
				t.Fatal(err)
			}
			switch event := event.(type) {
			case sandbox.Output:
				text = append(text, event.Data...)
			case sandbox.Exit:
				if event.Code != 0 {
					t.Fatalf("exit code %d: %s", event.Code, text)
				}
				return
			}
		}
	}
	wait(start("true")) // reads busybox
	// The rate is at most twice the limit, except for the first tenth of a second. A request waits for the ones before it, but its
	// own size delays only later ones. So a last, small one waits for all others.
	atLeast := time.Duration(2*size-mib) * time.Second / (2 * mib)
	began := time.Now()
	copies := start("dd", "if=/data", "of=/copy", "bs=64k", "conv=fsync")
	wait(start("true"))
	if took := time.Since(began); took > atLeast {
		t.Errorf("while the disks were used as much as the limit permits, a command took %v", took)
	}
	wait(copies)
	wait(start("dd", "if=/data", "of=/copy", "bs=4k", "count=1", "conv=fsync"))
	took := time.Since(began)
	t.Logf("copied in %v", took)
	if took < atLeast {
		t.Errorf("reading and writing %d MiB took %v, want at least %v", size/mib, took, atLeast)
	}

	began = time.Now()
	wait(start("dd", "if=/data", "of=/copy", "bs=4k", "count=500", "oflag=direct"))
	took = time.Since(began)
	t.Logf("written 500 times in %v", took)
	if want := (500 - 100) * time.Second / 200; took < want { // 500 writes of 4 KiB alone take 1 second
		t.Errorf("500 writes took %v, want at least %v", took, want)
	}

	wait(start("fallocate", "-l", "40M", "/large"))
	began = time.Now()
	wait(start("rm", "/large"))
	wait(start("dd", "if=/data", "of=/copy", "bs=4k", "count=1", "conv=fsync"))
	took = time.Since(began)
	t.Logf("written in %v", took)
	if took > 40*mib*time.Second/(2*mib)/2 { // half of the time that writing the freed space takes
		t.Errorf("after the removal of a file of 40 MiB, a write took %v", took)
	}
}
