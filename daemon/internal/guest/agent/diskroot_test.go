package agent

import (
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	pb "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
)

// capability is the value of security.capability that lets a program bind to low ports, in hexadecimal.
const capability = "0100000200040000000000000000000000000000"

// makeRootDisks creates the two disks for a root on disks: an image with the test tool, and an empty upper disk.
func makeRootDisks(t *testing.T) (image, upper string) {
	t.Helper()
	dir := t.TempDir()
	root := filepath.Join(dir, "root")
	if err := os.MkdirAll(filepath.Join(root, "etc"), 0o700); err != nil {
		t.Fatal(err)
	}
	addTool(t, root)
	file := filepath.Join(root, "etc/file")
	if err := os.WriteFile(file, []byte("in the image"), 0o640); err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{"user.test": "01", "security.capability": capability} {
		data, err := hex.DecodeString(value)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Setxattr(file, name, data, 0); err != nil {
			t.Fatal(err)
		}
	}
	image, upper = filepath.Join(dir, "image.erofs"), filepath.Join(dir, "upper.ext4")
	for _, args := range [][]string{
		{"mkfs.erofs", "--quiet", image, root},
		{"/sbin/mkfs.ext4", "-q", "-O", "^has_journal", upper, "64M"},
	} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			t.Fatalf("%q: %v\n%s", args, err, out)
		}
	}
	return image, upper
}

// diskContainer returns a request to create a container with its root on the disks.
func diskContainer(id string) *pb.CreateContainerRequest {
	spec := buildSpec(id)
	spec.Root.Path = "/run/kata-containers/nosuch" // not used
	spec.Annotations = map[string]string{"msb.root": "disks"}
	return &pb.CreateContainerRequest{ContainerId: id, ExecId: id, OCI: spec}
}

// testDiskRoot runs a container with its root on the disks, removes it, and leaves another one to checkUpper.
func testDiskRoot(t *testing.T, g *guest, upper string) {
	ctx := t.Context()
	const id = "disks1"
	runs := 0
	run := func(want string, args ...string) {
		t.Helper()
		runs++
		p := privileged(args...)
		for _, caps := range []*[]string{&p.Capabilities.Bounding, &p.Capabilities.Effective, &p.Capabilities.Permitted} {
			*caps = append(*caps, "CAP_SETFCAP")
		}
		if r := g.run(t, id, fmt.Sprint("run", runs), p); r.stdout+r.stderr != want {
			t.Errorf("tool %q: %v, want output %q", args, r, want)
		}
	}
	create := func(id string) {
		t.Helper()
		ok(t)(g.CreateContainer(ctx, diskContainer(id)))
		ok(t)(g.StartContainer(ctx, &pb.StartContainerRequest{ContainerId: id}))
	}

	// Requests that fail leave the disks to the next one.
	bad := diskContainer(id)
	bad.OCI.Annotations["msb.root"] = "disk"
	_, err := g.CreateContainer(ctx, bad)
	wantCode(t, err, codes.InvalidArgument)
	bad = diskContainer(id)
	bad.OCI.Mounts = append(bad.OCI.Mounts, &pb.Mount{Destination: "/x", Type: "bind", Source: "/run/nosuch", Options: []string{"bind"}})
	if _, err = g.CreateContainer(ctx, bad); err == nil {
		t.Fatal("a container with a mount of nothing was created")
	}
	create(id)
	_, err = g.CreateContainer(ctx, diskContainer("other"))
	wantCode(t, err, codes.FailedPrecondition)

	run("/: 40755 0:0\n/etc: 40700 0:0\n/etc/file: 100640 0:0\n", "stat", "/", "/etc", "/etc/file")
	run("/etc/file: \"in the image\" false\n", "files", "/etc/file")
	// Attributes of a file of the image, also after a change has copied it up, and of a new file.
	run("01 0203 ", "xattr", "/etc/file", "user.test", "0203")
	run(capability+" "+capability+" ", "xattr", "/etc/file", "security.capability", capability)
	run("", "put", "/srv/file", "written")
	run("no data available 04 ", "xattr", "/srv/file", "user.test", "04")
	run("no data available "+capability+" ", "xattr", "/srv/file", "security.capability", capability)

	// The container can neither open the disks nor see their file systems.
	run("msb-upper: open /srv/msb-upper: operation not permitted\nmsb-image: open /srv/msb-image: operation not permitted\n", "disks", "/srv")
	run("\n", "list", "/run")

	// The machine works when the disk is full, and the host gets back the space of a removed file.
	run("write /srv/full: no space left on device\n", "fill", "/srv/full")
	if _, err := g.health.Check(ctx, &pb.CheckRequest{}); err != nil {
		t.Fatal(err)
	}
	full := allocated(t, upper)
	run("", "remove", "/srv/full")
	if left := allocated(t, upper); full < 32<<20 || left > full/4 {
		t.Errorf("the full upper disk took %d bytes on the host, and takes %d after the removal of the file", full, left)
	}
	run("/srv/file: \"written\" false\n", "files", "/srv/file")

	ok(t)(g.RemoveContainer(ctx, &pb.RemoveContainerRequest{ContainerId: id}))
	create("disks2")
	if r := g.run(t, "disks2", "after", tool("files", "/srv/file")); r.stdout != "/srv/file: \"written\" false\n" {
		t.Errorf("a file of the container before: %v", r)
	}
}

// allocated returns how many bytes a file takes on its file system.
func allocated(t *testing.T, file string) int64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(file, &st); err != nil {
		t.Fatal(err)
	}
	return st.Blocks * 512
}

// checkUpper checks the upper disk after the guest has ended with a container that was running on it.
func checkUpper(t *testing.T, upper string) {
	t.Helper()
	if got := diskFile(t, upper, "/upper/srv/file"); got != "written" {
		t.Errorf("the file on the upper disk has %q, want written", got)
	}
	out, err := exec.Command("/sbin/dumpe2fs", "-h", upper).Output()
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(out), "Filesystem state:         clean\n") {
		t.Errorf("the upper disk was not unmounted:\n%s", out)
	}
	if out, err := exec.Command("/sbin/e2fsck", "-fn", upper).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
}
