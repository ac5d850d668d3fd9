package kata

import (
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"

	"github.com/msbd/msbd/daemon/internal/backend/hypervisor"
	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// killProcesses kills all processes of a sandbox, and no others.
func TestKillProcesses(t *testing.T) {
	id, other := newID(t), newID(t)
	cgroup, overhead := newCgroup(t, "msb-test/kata_"+id), newCgroup(t, "kata_overhead/"+id)
	ofSandbox := map[string]*exec.Cmd{
		"shim":                           startFake(t, "", "-namespace", "msb", "-address", "/run/x.sock", "-publish-binary", "", "-id", id),
		"shim that cleans up":            startFake(t, "", "-namespace", "msb", "-id", id, "-bundle", "/run/x", "delete"),
		"QEMU":                           startFake(t, "", "-name", "sandbox-"+id, "-uuid", "x"),
		"QEMU with debug option":         startFake(t, "", "-name", "sandbox-"+id+",debug-threads=on"),
		"Rust virtiofsd":                 startFake(t, "", "--syslog", "--shared-dir=/run/kata-containers/shared/sandboxes/"+id+"/shared"),
		"C virtiofsd":                    startFake(t, "", "-o", "source=/run/kata-containers/shared/sandboxes/"+id+"/shared"),
		"process in the cgroup":          startFake(t, cgroup),
		"process in the overhead cgroup": startFake(t, overhead),
		"QEMU of another user":           startFakeAs(t, 65534, "-name", "sandbox-"+id),
	}
	writeFile(t, filepath.Join(cgroup, "cgroup.procs"), strconv.Itoa(ofSandbox["QEMU of another user"].Process.Pid))
	others := map[string]*exec.Cmd{
		"shim of another sandbox":        startFake(t, "", "-id", other),
		"QEMU of another sandbox":        startFake(t, "", "-name", "sandbox-"+other),
		"QEMU of the hypervisor service": startFake(t, "", "-name", id),
		"tail of the console":            startFake(t, "", "-f", "/run/vc/vm/"+id+"/console.log"),
		"grep for the id":                startFake(t, "", "-r", id, "/run"),
		"virtiofsd of another sandbox":   startFake(t, "", "-o", "source=/run/kata-containers/shared/sandboxes/"+id+"0/shared"),
		"option -id without a value":     startFake(t, "", "-id"),
	}
	if err := killProcesses(t.Context(), id, testPrograms); err != nil {
		t.Fatal(err)
	}
	for name, cmd := range ofSandbox {
		if !isDead(t, cmd) {
			t.Errorf("%s still runs", name)
		}
	}
	for name, cmd := range others {
		if isDead(t, cmd) {
			t.Errorf("%s was killed", name)
		}
	}
	if err := killProcesses(t.Context(), id, testPrograms); err != nil { // now there are only zombies
		t.Error(err)
	}
}

// A local user can start a process with the arguments of a sandbox's process. It is not killed, and it does not hinder
// the removal of the sandbox.
func TestKillProcessesSparesPlantedOnes(t *testing.T) {
	id := newID(t)
	planted := []*exec.Cmd{
		startFakeAs(t, 65534, "-id", id),
		startFakeAs(t, 65534, "-name", "sandbox-"+id),
		startFakeAs(t, 65534, "--shared-dir="+hypervisor.SharedRoot+"/"+id+"/shared"),
	}
	// Another program of root's, for example one that another user runs with sudo.
	sh := exec.Command("/bin/sh", "-c", "read x", "-id", id)
	if _, err := sh.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	if err := sh.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { sh.Process.Kill(); sh.Wait() })
	waitUntil(t, "its arguments are visible", func() bool { return isShim(process.Arguments(sh.Process.Pid), id) })
	// A user may have a part of the cgroup tree, and creates a cgroup there.
	cgroup := newCgroup(t, "msb-test/of/a/user/kata_"+id)
	inCgroup := startFake(t, cgroup)
	if err := killProcesses(t.Context(), id, testPrograms); err != nil {
		t.Fatal(err)
	}
	for _, cmd := range append(planted, sh, inCgroup) {
		if isDead(t, cmd) {
			t.Errorf("%q was killed", cmd.Args)
		}
	}
}

func isDead(t *testing.T, cmd *exec.Cmd) bool {
	t.Helper()
	p, err := process.Open(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if p == nil {
		return true
	}
	defer p.Close()
	return p.Dead()
}

// killProcesses also kills the processes that another one starts until it is killed.
func TestKillProcessesThatFork(t *testing.T) {
	id := newID(t)
	cgroup := newCgroup(t, "msb-test/kata_"+id)
	cmd := exec.Command("/bin/sh", "-c", "echo $$ >"+cgroup+"/cgroup.procs; echo; while :; do sleep 1000 & done")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	if _, err := out.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if err := killProcesses(t.Context(), id, testPrograms); err != nil {
		t.Fatal(err)
	}
	if err := removeCgroups(t.Context(), id); err != nil { // fails if a process remains
		t.Error(err)
	}
	if !missing(cgroup) {
		t.Error("the cgroup was not removed")
	}
}

func TestFindQEMU(t *testing.T) {
	id := newID(t)
	cgroup := newCgroup(t, cgroupParent+"/kata_"+id)
	startFake(t, cgroup, "-id", id)
	startFake(t, "", "-name", "sandbox-"+id) // outside of the cgroup
	if p, err := findQEMU(id); p != nil || err != nil {
		t.Errorf("found %v, %v, want none", p, err)
	}
	qemu := startFake(t, cgroup, "-name", "sandbox-"+id)
	p, err := findQEMU(id)
	if err != nil || p == nil || p.PID != qemu.Process.Pid {
		t.Fatalf("found %v, %v, want process %d", p, err, qemu.Process.Pid)
	}
	p.Close()
}
