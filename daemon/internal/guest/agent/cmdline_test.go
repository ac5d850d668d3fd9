package agent

import (
	"log/slog"
	"slices"
	"testing"
	"time"
)

func TestParseCmdline(t *testing.T) {
	// As Kata's QEMU driver writes it, in debug mode.
	const line = "tsc=reliable panic=1 nr_cpus=4 console=hvc0 systemd.unit=kata-containers.target debug agent.log=debug " +
		"agent.hotplug_timeout=25 agent.container_pipe_size=131072 agent.debug_console agent.log_vport=1025 agent.x=y\n"
	got, warnings := parseCmdline(line)
	if want := (bootOptions{slog.LevelDebug, 25 * time.Second, 131072}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	if want := []string{
		"agent.debug_console: this agent does not have it", "agent.log_vport=1025: this agent does not have it",
		"agent.x=y: this agent does not have it",
	}; !slices.Equal(warnings, want) {
		t.Errorf("warnings %q", warnings)
	}
	for _, bad := range []string{"agent.log=loud", "agent.log", "agent.hotplug_timeout=-1", "agent.hotplug_timeout=", "agent.container_pipe_size=1k"} {
		if got, warnings := parseCmdline(bad); got != (bootOptions{}) || len(warnings) != 1 {
			t.Errorf("%s: %+v, %q", bad, got, warnings)
		}
	}
	if got, _ := parseCmdline("agent.hotplug_timeout=4000000000"); got.hotplugLimit != maxHotplugLimit {
		t.Errorf("a wait of %v", got.hotplugLimit)
	}
}

func TestDemandedPaths(t *testing.T) {
	const list = "\nvirtio_scsi /a.ko /b.ko\nsd_mod /c.ko\nlonely\n"
	for name, want := range map[string][]string{"virtio_scsi": {"/a.ko", "/b.ko"}, "sd_mod": {"/c.ko"}, "lonely": nil, "x": nil} {
		if got := demandedPaths(list, name); !slices.Equal(got, want) {
			t.Errorf("%s: %q", name, got)
		}
	}
}
