package kata

import (
	"os/exec"
	"testing"

	"github.com/msbd/msbd/daemon/internal/sys/process"
)

// Whatever a sandbox has of processes is found and ended, and nothing else.
func TestKillProcesses(t *testing.T) {
	id, other := newID(t), newID(t)
	cgroup, overhead := makeCgroup(t, "msb-test/kata_"+id), makeCgroup(t, "kata_overhead/"+id)
	doomed := map[string]*exec.Cmd{
		"shim":                        play(t, "", "-namespace", "msb", "-address", "/run/x.sock", "-publish-binary", "", "-id", id),
		"shim that cleans up":         play(t, "", "-namespace", "msb", "-id", id, "-bundle", "/run/x", "delete"),
		"QEMU":                        play(t, "", "-name", "sandbox-"+id, "-uuid", "x"),
		"QEMU that is debugged":       play(t, "", "-name", "sandbox-"+id+",debug-threads=on"),
		"virtiofsd in Rust":           play(t, "", "--syslog", "--shared-dir=/run/kata-containers/shared/sandboxes/"+id+"/shared"),
		"virtiofsd in C":              play(t, "", "-o", "source=/run/kata-containers/shared/sandboxes/"+id+"/shared"),
		"something in the cgroup":     play(t, cgroup),
		"something that is left over": play(t, overhead),
	}
	spared := map[string]*exec.Cmd{
		"another's shim":      play(t, "", "-id", other),
		"another's QEMU":      play(t, "", "-name", "sandbox-"+other),
		"our own QEMU":        play(t, "", "-name", id),
		"somebody who looks":  play(t, "", "-f", "/run/vc/vm/"+id+"/console.log"),
		"somebody who seeks":  play(t, "", "-r", id, "/run"),
		"another's virtiofsd": play(t, "", "-o", "source=/run/kata-containers/shared/sandboxes/"+id+"0/shared"),
		"an id without value": play(t, "", "-id"),
	}
	if err := killProcesses(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	for what, cmd := range doomed {
		if !dead(t, cmd) {
			t.Errorf("%s lives on", what)
		}
	}
	for what, cmd := range spared {
		if dead(t, cmd) {
			t.Errorf("%s was ended", what)
		}
	}
	if err := killProcesses(t.Context(), id); err != nil { // zombies, by now, and nobody
		t.Error(err)
	}
}

func dead(t *testing.T, cmd *exec.Cmd) bool {
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

// A process that starts others until its end leaves none.
func TestKillProcessesThatMultiply(t *testing.T) {
	id := newID(t)
	cgroup := makeCgroup(t, "msb-test/kata_"+id)
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
	if err := killProcesses(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if err := removeCgroups(t.Context(), id); err != nil { // which needs it to be empty
		t.Error(err)
	}
	if !missing(cgroup) {
		t.Error("the cgroup is left")
	}
}

func TestFindQEMU(t *testing.T) {
	id := newID(t)
	cgroup := makeCgroup(t, cgroupParent+"/kata_"+id)
	play(t, cgroup, "-id", id)
	play(t, "", "-name", "sandbox-"+id) // outside
	if p, err := findQEMU(id); p != nil || err != nil {
		t.Errorf("found %v, %v where there is none", p, err)
	}
	qemu := play(t, cgroup, "-name", "sandbox-"+id)
	p, err := findQEMU(id)
	if err != nil || p == nil || p.PID != qemu.Process.Pid {
		t.Fatalf("found %v, %v, not process %d", p, err, qemu.Process.Pid)
	}
	p.Close()
}
