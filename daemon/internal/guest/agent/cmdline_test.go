package agent

import (
	"log/slog"
	"slices"
	"testing"
)

func TestParseCmdline(t *testing.T) {
	// This is the command line that Kata's QEMU driver passes in debug mode.
	const line = "tsc=reliable panic=1 nr_cpus=4 console=hvc0 systemd.unit=kata-containers.target debug agent.log=debug " +
		"agent.hotplug_timeout=25 agent.debug_console agent.log_vport=1025 agent.x=y\n"
	got, warnings := parseCmdline(line)
	if got != slog.LevelDebug {
		t.Errorf("level is %v, want %v", got, slog.LevelDebug)
	}
	if want := []string{
		"agent.hotplug_timeout=25: not supported by this agent", "agent.debug_console: not supported by this agent",
		"agent.log_vport=1025: not supported by this agent", "agent.x=y: not supported by this agent",
	}; !slices.Equal(warnings, want) {
		t.Errorf("warnings are %q, want %q", warnings, want)
	}
	for _, bad := range []string{"agent.log=loud", "agent.log"} {
		if got, warnings := parseCmdline(bad); got != slog.LevelInfo || len(warnings) != 1 {
			t.Errorf("parseCmdline(%q) = %v, %q; want %v and 1 warning", bad, got, warnings, slog.LevelInfo)
		}
	}
}
