package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	agent "github.com/kata-containers/kata-containers/src/runtime/virtcontainers/pkg/agent/protocols/grpc"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
)

// measurement is an operation to time. before and after run before and after it and are not timed; they may be nil. took
// returns the time of an operation that measures itself; it is nil for all others.
type measurement struct {
	name          string
	before, after func() error
	run           func() error
	took          func() time.Duration
}

// compare runs each of all n times and prints a line for each, with its ratio to the first. It alternates between them,
// so that a machine that becomes slower meanwhile slows all of them.
func compare(b *testing.B, n int, all ...measurement) {
	b.Helper()
	took := make([][]time.Duration, len(all))
	for round := range n + 1 {
		for i, m := range all {
			if m.before != nil {
				if err := m.before(); err != nil {
					b.Fatalf("%s: %v", m.name, err)
				}
			}
			began := time.Now()
			err := m.run()
			d := time.Since(began)
			if m.took != nil {
				d = m.took()
			}
			if m.after != nil {
				if err := m.after(); err != nil {
					b.Fatalf("%s: %v", m.name, err)
				}
			}
			if err != nil {
				b.Fatalf("%s: %v", m.name, err)
			}
			if round > 0 { // the first round is a warm-up
				took[i] = append(took[i], d)
			}
		}
	}
	fmt.Printf("\n%-48s %5s %10s %10s %7s\n", b.Name(), "n", "p50 ms", "p99 ms", "ratio")
	base := percentile(took[0], 50)
	for i, m := range all {
		p50 := percentile(took[i], 50)
		fmt.Printf("%-48s %5d %10.2f %10.2f %7.2f\n", m.name, n, ms(p50), ms(percentile(took[i], 99)), float64(p50)/float64(base))
	}
	b.ReportMetric(ms(base), "p50-ms")
	b.ReportMetric(0, "ns/op") // omit it: the table is more precise
}

func ms(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

func percentile(d []time.Duration, p int) time.Duration {
	s := slices.Clone(d)
	slices.Sort(s)
	return s[min(len(s)-1, len(s)*p/100)]
}

// rounds returns how often to run each measurement: MSB_BENCH_ROUNDS, or def.
func rounds(def int) int {
	if n, err := strconv.Atoi(os.Getenv("MSB_BENCH_ROUNDS")); err == nil && n > 0 {
		return n
	}
	return def
}

// must returns a function that makes the call and returns an error if the call fails.
func (s *server) must(key, method string, p params) func() error {
	return func() error {
		a, err := s.call(key, method, p)
		if err == nil && a.Error != nil {
			err = fmt.Errorf("%v", a)
		}
		return err
	}
}

// BenchmarkColdStart measures the time from no sandbox to the first result of Python. It compares that with the mere
// boot of the same kernel and initramfs, and with a plain container of the same image.
func BenchmarkColdStart(b *testing.B) {
	s, key := sharedServer(b)
	name := params{"sandbox": "cold"}
	start, stop := s.must(key, "sandbox.start", name), s.must(key, "sandbox.stop", name)
	python := s.must(key, "sandbox.repl.run", params{"sandbox": "cold", "language": "python", "code": "1+1"})
	bundle := runcBundle(b, "python")
	id := fmt.Sprintf("msb-bench-%d", os.Getpid())
	st, err := s.status()
	if err != nil {
		b.Fatal(err)
	}
	var bare *bareVM
	compare(b, rounds(10),
		measurement{name: "sandbox.start + first repl.run", after: stop, run: func() error {
			if err := start(); err != nil {
				return err
			}
			return python()
		}},
		measurement{name: "sandbox.start + first command.run true", after: stop, run: func() error {
			if err := start(); err != nil {
				return err
			}
			return s.must(key, "sandbox.command.run", params{"sandbox": "cold", "command": "true"})()
		}},
		measurement{name: "bare QEMU boot until its agent responds", after: func() error { return bare.stop() }, run: func() (err error) {
			bare, err = bootBare(st.Isolation.Accelerator)
			return err
		}},
		measurement{name: "runc run + exec python3",
			after: func() error { return exec.Command("runc", "delete", "--force", id).Run() },
			run: func() error {
				// No output pipe: the container would inherit it and keep it open, so that Run would not return.
				if err := exec.Command("runc", "run", "--detach", "--bundle", bundle, id).Run(); err != nil {
					return err
				}
				out, err := exec.Command("runc", "exec", id, "python3", "-c", "print(1+1)").CombinedOutput()
				if err != nil {
					return fmt.Errorf("%w: %s", err, out)
				}
				return nil
			}},
	)
}

// BenchmarkRoundTrip measures a run in a sandbox that has started before. It compares that with containerd's own way to
// run a command in the same sandbox.
func BenchmarkRoundTrip(b *testing.B) {
	s, key := startSandbox(b, "warm", "microsandbox/python")
	id := s.sandboxIDs()[0]
	ctr := func() error {
		cmd := exec.Command(filepath.Join(bin, "ctr"), "--address", filepath.Join(s.runDir, "containerd.sock"), "--namespace", "msb",
			"tasks", "exec", "--exec-id", fmt.Sprintf("bench-%d", time.Now().UnixNano()), id, "true")
		// Keep standard input open until ctr ends: at its end, ctr would close it in a way that locks up Kata's shim.
		stdin, err := cmd.StdinPipe()
		if err != nil {
			return err
		}
		defer stdin.Close()
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("%w: %s", err, out)
		}
		return nil
	}
	// The floor of a command is what the emulated or virtual processor needs to start the program, as measured inside.
	var inside time.Duration
	floor := func() error {
		code := "import subprocess, time\nbegan = time.monotonic()\nsubprocess.run(['true'])\nprint(time.monotonic() - began)"
		seconds, err := strconv.ParseFloat(strings.TrimSpace(s.python(b, key, "warm", code).text("stdout")), 64)
		inside = time.Duration(seconds * float64(time.Second))
		return err
	}
	compare(b, rounds(50),
		measurement{name: "ctr task exec true", run: ctr},
		measurement{name: "start and end of true in the guest, by Python", run: floor, took: func() time.Duration { return inside }},
		measurement{name: "sandbox.command.run true", run: s.must(key, "sandbox.command.run", params{"sandbox": "warm", "command": "true"})},
		measurement{name: "sandbox.repl.run 1+1", run: s.must(key, "sandbox.repl.run", params{"sandbox": "warm", "language": "python", "code": "1+1"})},
		measurement{name: "a request that runs nothing (metrics of no sandbox)", run: s.must(key, "sandbox.metrics.get", params{"namespace": "empty"})},
	)
}

// BenchmarkStream measures the time from a request until the first byte that code prints is at the client, while the code
// still runs. It compares that with the complete result of the same code.
func BenchmarkStream(b *testing.B) {
	s, key := startSandbox(b, "stream", "microsandbox/python")
	p := params{"sandbox": "stream", "language": "python", "code": "print('x')"}
	var open *events
	compare(b, rounds(50),
		measurement{name: "sandbox.repl.run print('x')", run: s.must(key, "sandbox.repl.run", p)},
		measurement{name: "the same as event stream, until the first output", run: func() error {
			open = s.stream(b, key, "sandbox.repl.run", p)
			open.want(b, "output", "x")
			return nil
		}, after: func() error {
			open.want(b, "result", "success")
			return open.body.Close()
		}},
	)
}

// BenchmarkFiles measures the transfer of a file of 64 MiB between the client and the disk of a sandbox. It compares that
// with the same bytes over the standard streams of containerd's exec.
func BenchmarkFiles(b *testing.B) {
	s, key := startSandbox(b, "box", "microsandbox/python")
	id := s.sandboxIDs()[0]
	const size = 64 << 20
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(data)
	ctr := func(input []byte, command string) error {
		cmd := exec.Command(filepath.Join(bin, "ctr"), "--address", filepath.Join(s.runDir, "containerd.sock"), "--namespace", "msb",
			"tasks", "exec", "--exec-id", fmt.Sprintf("bench-%d", time.Now().UnixNano()), id, "sh", "-c", command)
		// As in BenchmarkRoundTrip, standard input stays open until ctr ends.
		stdin, err := cmd.StdinPipe()
		if err != nil {
			return err
		}
		defer stdin.Close()
		if err := cmd.Start(); err != nil {
			return err
		}
		if _, err := stdin.Write(input); err != nil {
			return err
		}
		return cmd.Wait()
	}
	status := func(res *http.Response, want int) error {
		n, err := io.Copy(io.Discard, res.Body)
		if err == nil && (res.StatusCode != want || want == 200 && n != size) {
			err = fmt.Errorf("HTTP %d with %d bytes", res.StatusCode, n)
		}
		return err
	}
	if err := status(s.file(b, key, "PUT", "/root/file", bytes.NewReader(data)), 201); err != nil {
		b.Fatal(err)
	}
	compare(b, rounds(1),
		measurement{name: "64 MiB down: ctr task exec cat", run: func() error { return ctr(nil, "cat /root/file") }},
		measurement{name: "64 MiB down: GET file", run: func() error { return status(s.file(b, key, "GET", "/root/file", nil), 200) }},
	)
	compare(b, rounds(1),
		measurement{name: "64 MiB up: ctr task exec head", run: func() error {
			return ctr(data, fmt.Sprintf("head -c %d > /root/copy", size))
		}},
		measurement{name: "64 MiB up: PUT file", run: func() error {
			s.command(b, key, "box", "rm", "-f", "/root/copy")
			return status(s.file(b, key, "PUT", "/root/copy", bytes.NewReader(data)), 201)
		}},
	)
}

// BenchmarkRequest measures a request that is authenticated, decoded and answered without a sandbox. It compares that
// with a server in dev mode, which needs no key, and with a bare net/http handler whose response has as many bytes.
func BenchmarkRequest(b *testing.B) {
	s, key := sharedServer(b)
	dev, err := newServer("--dev")
	if err == nil {
		err = dev.start()
	}
	if err != nil {
		b.Fatal(err)
	}
	defer dev.close()
	body := []byte(`{"jsonrpc":"2.0","result":{"sandboxes":[]},"id":1}`)
	bare := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.Copy(io.Discard, r.Body)
		w.Header().Set("Content-Type", "application/json")
		w.Write(body)
	}))
	defer bare.Close()
	plain := &server{address: bare.Listener.Addr().String()}
	empty := params{"namespace": "empty"}
	compare(b, rounds(2000),
		measurement{name: "bare net/http handler", run: plain.must("", "sandbox.metrics.get", empty)},
		measurement{name: "the server in dev mode", run: dev.must("", "sandbox.metrics.get", empty)},
		measurement{name: "the server with a key", run: s.must(key, "sandbox.metrics.get", empty)},
	)
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

// runcBundle unpacks an image and returns an OCI bundle for runc.
func runcBundle(b *testing.B, image string) string {
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
	process["args"], process["terminal"] = []string{"sleep", "3600"}, false
	text, err := json.Marshal(spec)
	if err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o600); err != nil {
		b.Fatal(err)
	}
	return dir
}

func readJSON(b *testing.B, path string, out any) {
	b.Helper()
	text, err := os.ReadFile(path)
	if err == nil {
		err = json.Unmarshal(text, out)
	}
	if err != nil {
		b.Fatal(err)
	}
}

// BenchmarkRestart measures how long a server with 10,000 keys takes from its start until it is ready, and how much
// memory it uses then. It compares that with a server without keys. containerd keeps running, as in a crash or an
// upgrade.
func BenchmarkRestart(b *testing.B) {
	restart := func(keys int) measurement {
		s, err := newServer()
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			if err := s.close(); err != nil {
				b.Error(err)
			}
		})
		if err := s.start(); err != nil {
			b.Fatal(err)
		}
		a := s.admin(b)
		var g errgroup.Group
		g.SetLimit(64)
		for range keys {
			g.Go(func() error {
				_, err := a.CreateKey(b.Context(), &adminv1.CreateKeyRequest{Expire: "1y"})
				return err
			})
		}
		if err := g.Wait(); err != nil {
			b.Fatal(err)
		}
		return measurement{
			name:   fmt.Sprintf("kill -9, start to ready with %d keys", keys),
			before: func() error { s.kill(); return nil },
			run:    func() error { return s.start() },
			after: func() error {
				b.ReportMetric(float64(residentKiB(s.cmd.Process.Pid))/1024, fmt.Sprintf("MiB-with-%d-keys", keys))
				return nil
			},
		}
	}
	compare(b, rounds(20), restart(0), restart(10_000))
}

// residentKiB returns the resident memory of a process, in KiB, or 0 if the process does not exist.
func residentKiB(pid int) (n int) {
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	for line := range strings.Lines(string(status)) {
		fmt.Sscanf(line, "VmRSS: %d kB", &n)
	}
	return n
}

// BenchmarkSDKs prints the time of a run through each SDK, compared with the same request sent without the SDK.
func BenchmarkSDKs(b *testing.B) {
	s, key := sharedServer(b)
	for _, language := range []string{"python", "typescript"} {
		cmd := exec.Command(filepath.Join(root, "client", language, "check.sh"), "bench")
		cmd.Env = append(os.Environ(), "MSB_SERVER_URL=http://"+s.address, "MSB_API_KEY="+key)
		cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
		fmt.Printf("\n%s/%s\n", b.Name(), language)
		if err := cmd.Run(); err != nil {
			b.Fatalf("%s: %v", language, err)
		}
	}
	b.ReportMetric(0, "ns/op") // omit it: the tables are more precise
}

// BenchmarkGoClient measures a run through the Go client whose output is passed on while it is printed, and compares it with
// the same request sent without the client.
func BenchmarkGoClient(b *testing.B) {
	s, key := startSandbox(b, "go", "microsandbox/python")
	box := (&client.Client{ServerURL: "http://" + s.address, Key: client.NewKey(key)}).Sandbox("", "go")
	raw := params{"sandbox": "go", "language": "python", "code": "print('x')", "encoding": "base64"}
	compare(b, rounds(50),
		measurement{name: "sandbox.repl.run as event stream", run: func() error {
			open := s.stream(b, key, "sandbox.repl.run", raw)
			open.want(b, "output", "eAo=")
			open.want(b, "result", "success")
			return open.body.Close()
		}},
		measurement{name: "client.Sandbox.Run with Stdout", run: func() error {
			_, err := box.Run(b.Context(), client.Code{Language: "python", Source: "print('x')", Stdout: io.Discard})
			return err
		}},
	)
}
