package agent

import (
	"encoding/json"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"testing"
)

// machine is QEMU's monitor, through which Kata's driver plugs in what a sandbox needs.
type machine struct {
	conn    net.Conn
	decoder *json.Decoder
	disks   int
}

// plugBridge is where Kata's driver puts disks and cards, at a slot of the first bus.
const (
	plugBridge = "pci-bridge-0"
	bridgeSlot = "1e"
)

// stockArguments describe a machine as Kata's QEMU driver does.
func stockArguments(monitor, cmdline string) []string {
	return []string{
		"-append", cmdline, "-qmp", "unix:" + monitor + ",server=on,wait=off",
		"-device", "pci-bridge,id=" + plugBridge + ",bus=pcie.0,chassis_nr=1,shpc=off,io-reserve=4k,mem-reserve=1m,pref64-reserve=1m,addr=" + bridgeSlot,
	}
}

func dialMachine(t *testing.T, socket string) *machine {
	t.Helper()
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	m := &machine{conn: conn, decoder: json.NewDecoder(conn)}
	var greeting struct{ QMP any }
	if err := m.decoder.Decode(&greeting); err != nil {
		t.Fatal(err)
	}
	m.do(t, "qmp_capabilities", nil)
	return m
}

// do executes a command and returns its result.
func (m *machine) do(t *testing.T, command string, arguments map[string]any) json.RawMessage {
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
		} // else an event
	}
}

// waitFor reads events until one of a kind tells of a device.
func (m *machine) waitFor(t *testing.T, event, device string) {
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

// plugDisk plugs a file in as a virtio disk, and returns its PCI path.
func (m *machine) plugDisk(t *testing.T, file string) (path string) {
	t.Helper()
	id := m.openDisk(t, file)
	m.do(t, "device_add", map[string]any{
		"driver": "virtio-blk-pci", "id": "dev-" + id, "drive": id, "bus": plugBridge, "addr": fmt.Sprintf("%02x", m.disks),
		"share-rw": true,
	})
	return fmt.Sprintf("%s/%02x", bridgeSlot, m.disks)
}

func (m *machine) openDisk(t *testing.T, file string) (id string) {
	t.Helper()
	m.disks++
	id = fmt.Sprintf("disk%d", m.disks)
	m.do(t, "blockdev-add", map[string]any{"node-name": id, "driver": "raw", "file": map[string]any{"driver": "file", "filename": file}})
	return id
}

// unplug takes a disk away, as the shim does when its container is removed.
func (m *machine) unplug(t *testing.T, number int) {
	t.Helper()
	id := fmt.Sprintf("disk%d", number)
	m.do(t, "device_del", map[string]any{"id": "dev-" + id})
	m.waitFor(t, "DEVICE_DELETED", "dev-"+id)
	m.do(t, "blockdev-del", map[string]any{"node-name": id})
}

// makeDisk makes a file with a file system of size MiB that holds a directory.
func makeDisk(t *testing.T, dir string, size int) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "disk.ext4")
	out, err := exec.Command("/sbin/mkfs.ext4", "-q", "-b", "4096", "-d", dir, file, fmt.Sprintf("%dM", size)).CombinedOutput()
	if err != nil {
		t.Fatalf("mkfs.ext4: %v\n%s", err, out)
	}
	return file
}

// diskFile returns a file of the file system in a disk that no machine uses.
func diskFile(t *testing.T, disk, path string) string {
	t.Helper()
	out, err := exec.Command("/sbin/debugfs", "-R", "cat "+path, disk).Output()
	if err != nil {
		t.Fatalf("debugfs: %v", err)
	}
	return string(out)
}
