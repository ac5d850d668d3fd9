package agent

import (
	"encoding/json"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"testing"
)

// qmpClient is a client of QEMU's monitor (QMP), with which Kata's driver hot-plugs devices.
type qmpClient struct {
	conn    net.Conn
	decoder *json.Decoder
	disks   int // disks opened so far
}

const (
	// plugBridge is the PCI bridge into which Kata's driver plugs disks and network interfaces.
	plugBridge = "pci-bridge-0"
	// bridgeSlot is the bridge's slot on the first bus.
	bridgeSlot = "1e"
)

// stockArguments returns QEMU arguments as Kata's QEMU driver passes them. monitor is the path of the QMP socket.
func stockArguments(monitor, cmdline string) []string {
	return []string{
		"-append", cmdline, "-qmp", "unix:" + monitor + ",server=on,wait=off",
		"-device", "pci-bridge,id=" + plugBridge + ",bus=pcie.0,chassis_nr=1,shpc=off,io-reserve=4k,mem-reserve=1m,pref64-reserve=1m,addr=" + bridgeSlot,
	}
}

// dialQMP connects to QEMU's monitor.
func dialQMP(t *testing.T, socket string) *qmpClient {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	m := &qmpClient{conn: conn, decoder: json.NewDecoder(conn)}
	var greeting struct{ QMP any }
	if err := m.decoder.Decode(&greeting); err != nil {
		t.Fatal(err)
	}
	m.do(t, "qmp_capabilities", nil)
	return m
}

// do executes a command and returns its result.
func (m *qmpClient) do(t *testing.T, command string, arguments map[string]any) json.RawMessage {
	t.Helper()
	if arguments == nil {
		arguments = map[string]any{}
	}
	request, err := json.Marshal(map[string]any{"execute": command, "arguments": arguments})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.conn.Write(request); err != nil {
		t.Fatal(err)
	}
	for {
		var answer struct {
			Return json.RawMessage
			Error  *struct{ Desc string }
		}
		if err := m.decoder.Decode(&answer); err != nil {
			t.Fatalf("%s: %v", command, err)
		}
		if answer.Error != nil {
			t.Fatalf("%s %v: %s", command, arguments, answer.Error.Desc)
		}
		if answer.Return != nil {
			return answer.Return
		} // else it is an event
	}
}

// waitFor reads events until the given event has occurred for a device.
func (m *qmpClient) waitFor(t *testing.T, event, device string) {
	t.Helper()
	for {
		var e struct {
			Event string
			Data  struct{ Device string }
		}
		if err := m.decoder.Decode(&e); err != nil {
			t.Fatalf("wait for %s of %s: %v", event, device, err)
		}
		if e.Event == event && e.Data.Device == device {
			return
		}
	}
}

// plugDisk plugs a file in as a virtio disk and returns its PCI path.
func (m *qmpClient) plugDisk(t *testing.T, file string) (path string) {
	t.Helper()
	id := m.openDisk(t, file)
	m.do(t, "device_add", map[string]any{
		"driver": "virtio-blk-pci", "id": "dev-" + id, "drive": id, "bus": plugBridge, "addr": fmt.Sprintf("%02x", m.disks),
		"share-rw": true,
	})
	return fmt.Sprintf("%s/%02x", bridgeSlot, m.disks)
}

// openDisk opens a file as a block device of QEMU's and returns its id.
func (m *qmpClient) openDisk(t *testing.T, file string) (id string) {
	t.Helper()
	m.disks++
	id = fmt.Sprintf("disk%d", m.disks)
	m.do(t, "blockdev-add", map[string]any{"node-name": id, "driver": "raw", "file": map[string]any{"driver": "file", "filename": file}})
	return id
}

// unplug unplugs the disk with a number, as the shim does when its container is removed.
func (m *qmpClient) unplug(t *testing.T, number int) {
	t.Helper()
	id := fmt.Sprintf("disk%d", number)
	m.do(t, "device_del", map[string]any{"id": "dev-" + id})
	m.waitFor(t, "DEVICE_DELETED", "dev-"+id)
	m.do(t, "blockdev-del", map[string]any{"node-name": id})
}

// makeDisk creates a file of size MiB with an ext4 file system that has the content of a directory.
func makeDisk(t *testing.T, dir string, size int) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk.ext4")
	out, err := exec.Command("/sbin/mkfs.ext4", "-q", "-b", "4096", "-d", dir, file, fmt.Sprintf("%dM", size)).CombinedOutput()
	if err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	return file
}

// diskFile returns the content of a file on a disk that no machine is using.
func diskFile(t *testing.T, disk, path string) string {
	t.Helper()
	out, err := exec.Command("/sbin/debugfs", "-R", "cat "+path, disk).Output()
	if err != nil {
		t.Fatalf("debugfs: %v", err)
	}
	return string(out)
}
