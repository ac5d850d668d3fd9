package e2e

// The peers that the benchmarks measure beside msbd.

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// containers is a program that runs OCI bundles, with its first arguments.
type containers []string

var runc = containers{"runc"}

// gVisor returns gVisor's runsc, on a platform that needs no KVM.
func gVisor(t testing.TB) containers {
	t.Helper()
	dir := t.TempDir()
	t.Cleanup(func() { // runsc keeps a network namespace there
		if err := syscall.Unmount(filepath.Join(dir, "null-netns"), 0); err != nil {
			t.Error(err)
		}
	})
	return containers{filepath.Join(bin, "runsc"), "--root", dir, "--network", "none", "--platform", "systrap"}
}

// do runs the program with more arguments. There is no pipe for its output: a container that stays would keep it open, and do
// would wait for that.
func (c containers) do(args ...string) error {
	output, err := os.CreateTemp("", "msb")
	if err != nil {
		return err
	}
	defer os.Remove(output.Name())
	defer output.Close()
	cmd := exec.Command(c[0], append(c[1:len(c):len(c)], args...)...)
	cmd.Stdout, cmd.Stderr = output, output
	if err := cmd.Run(); err != nil {
		text, _ := os.ReadFile(output.Name())
		return fmt.Errorf("%s: %w: %s", filepath.Base(c[0]), err, bytes.TrimSpace(text))
	}
	return nil
}

var containerCount atomic.Int32

// newContainer returns a name for a container that no other process uses. No name begins with another one, because runsc also
// takes the beginning of a name.
func newContainer() string {
	return fmt.Sprintf("msb-bench-%d-%06d", os.Getpid(), containerCount.Add(1))
}

// starts are the measurements of the start of a container and of the first command in it. name is that of the program,
// and each measurement is compared with the same one of peer.
func (c containers) starts(name, peer, bundle string) []measurement {
	var id string
	var took time.Duration // of the run alone
	start := func() error {
		id = newContainer()
		began := time.Now()
		err := c.do("run", "--detach", "--bundle", bundle, id)
		took = time.Since(began)
		return err
	}
	first := func(command ...string) func() error {
		return func() error {
			if err := start(); err != nil {
				return err
			}
			return c.do(append([]string{"exec", id}, command...)...)
		}
	}
	end := func() error { return c.do("delete", "--force", id) }
	return []measurement{
		{name: name + ": " + startToCode, beside: peer + ": " + startToCode, run: first("python3", "-c", "print(1+1)"), after: end},
		{name: name + ": " + startToCommand, beside: peer + ": " + startToCommand, run: first("true"), after: end},
		{name: name + ": " + startOnly, beside: peer + ": " + startOnly, run: func() error { return nil }, took: func() time.Duration { return took }},
	}
}

// stockKata prepares containers that ctr starts with Kata's own settings: only the paths of the files are set. Kata's project
// delivers its guest as files that no package has, so this uses the guest of msbd. stockKata returns an error if such a
// container cannot be started on this host.
func stockKata(b *testing.B, s *server) ([]measurement, error) {
	b.Helper()
	settings := filepath.Join(b.TempDir(), "kata.toml")
	text := fmt.Sprintf("[hypervisor.qemu]\npath = %q\nkernel = %q\ninitrd = %q\nvirtio_fs_daemon = %q\nshared_fs = \"virtio-fs\"\n",
		"/usr/bin/qemu-system-x86_64", filepath.Join(bin, "guest/vmlinux"), filepath.Join(bin, "guest/initrd.img"), filepath.Join(bin, "msb-virtiofsd"))
	if err := os.WriteFile(settings, []byte(text), 0o600); err != nil {
		b.Fatal(err)
	}
	ctr := containers{filepath.Join(bin, "ctr"), "--address", s.containerd, "--namespace", "bench"}
	if err := ctr.do("images", "import", "--snapshotter", "overlayfs", filepath.Join(bin, "images/python.tar")); err != nil {
		b.Fatal(err)
	}
	var id string
	start := func() error {
		id = newContainer()
		return ctr.do("run", "--detach", "--snapshotter", "overlayfs", "--runtime", "io.containerd.kata.v2", "--runtime-config-path", settings,
			"docker.io/microsandbox/python:latest", id, "sleep", "3600")
	}
	end := func() error {
		return errors.Join(ctr.do("tasks", "delete", "--force", id), ctr.do("containers", "delete", id))
	}
	if err := start(); err != nil {
		ctr.do("containers", "delete", id) // what is left of it
		return nil, errors.New(strings.ReplaceAll(err.Error(), settings, filepath.Base(settings)))
	}
	if err := end(); err != nil {
		b.Fatal(err)
	}
	return []measurement{{name: kataStart, beside: "runc: " + startToCommand, after: end, run: func() error {
		if err := start(); err != nil {
			return err
		}
		return ctr.do("tasks", "exec", "--exec-id", id+"-true", id, "true")
	}}}, nil
}

// bareVM is QEMU with the guest's kernel and initramfs, without msbd, Kata or containerd.
type bareVM struct {
	cmd *exec.Cmd
	dir string
}

// bootBare boots a bareVM and returns it when its guest agent responds. The caller must call stop.
func bootBare(accelerator string) (*bareVM, error) {
	dir, err := os.MkdirTemp("", "msb")
	if err != nil {
		return nil, err
	}
	sock := filepath.Join(dir, "agent.sock")
	kernelArgs := "quiet loglevel=0 panic=-1 reboot=t cryptomgr.notests random.trust_cpu=on"
	if accelerator == "tcg" {
		kernelArgs += " mitigations=off"
	}
	vm := &bareVM{dir: dir, cmd: exec.Command("qemu-system-x86_64", "-M", "q35", "-bios", "qboot.rom",
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-accel", accelerator, "-cpu", "max",
		"-smp", "1", "-m", "640", "-kernel", filepath.Join(bin, "guest/vmlinux"), "-initrd", filepath.Join(bin, "guest/initrd.img"),
		"-append", kernelArgs,
		"-device", "virtio-serial-pci", "-chardev", "socket,id=a,path="+sock+",server=on,wait=off",
		"-device", "virtserialport,chardev=a,name=kata.agent.0", "-device", "virtio-rng-pci")}
	if err := vm.cmd.Start(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience*30*time.Second)
	defer cancel()
	var conn net.Conn
	for conn == nil {
		if conn, err = net.Dial("unix", sock); err != nil && ctx.Err() != nil {
			vm.stop()
			return nil, err
		}
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	if _, err := agent.NewHealthClient(client).Check(ctx, &agent.CheckRequest{}); err != nil {
		vm.stop()
		return nil, err
	}
	return vm, nil
}

func (vm *bareVM) stop() error {
	vm.cmd.Process.Kill()
	vm.cmd.Wait()
	return os.RemoveAll(vm.dir)
}

// ociBundle unpacks an image and returns an OCI bundle for runc and gVisor, in which command runs.
func ociBundle(b testing.TB, image string, command ...string) string {
	b.Helper()
	dir := b.TempDir()
	rootfs := filepath.Join(dir, "rootfs")
	if err := os.Mkdir(rootfs, 0o755); err != nil {
		b.Fatal(err)
	}
	archive := filepath.Join(dir, "image")
	if err := os.Mkdir(archive, 0o755); err != nil {
		b.Fatal(err)
	}
	if out, err := exec.Command("tar", "-xf", filepath.Join(bin, "images", image+".tar"), "-C", archive).CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	var index ocispec.Index
	readJSON(b, filepath.Join(archive, "index.json"), &index)
	blob := func(d ocispec.Descriptor) string {
		return filepath.Join(archive, "blobs", string(d.Digest.Algorithm()), d.Digest.Encoded())
	}
	var manifest ocispec.Manifest
	readJSON(b, blob(index.Manifests[0]), &manifest)
	for _, layer := range manifest.Layers {
		if out, err := exec.Command("tar", "-xf", blob(layer), "-C", rootfs).CombinedOutput(); err != nil {
			b.Fatalf("%v: %s", err, out)
		}
	}
	cmd := exec.Command("runc", "spec")
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		b.Fatalf("%v: %s", err, out)
	}
	var spec map[string]any
	path := filepath.Join(dir, "config.json")
	readJSON(b, path, &spec)
	process := spec["process"].(map[string]any)
	process["args"], process["terminal"] = command, false
	text, err := json.Marshal(spec)
	if err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		b.Fatal(err)
	}
	return dir
}

func readJSON(b testing.TB, path string, out any) {
	b.Helper()
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, out)
	}
	if err != nil {
		b.Fatal(err)
	}
}
