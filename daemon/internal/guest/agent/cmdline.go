package agent

import (
	"log/slog"
	"strings"
)

var logLevels = map[string]slog.Level{
	"trace": slog.LevelDebug, "debug": slog.LevelDebug, "info": slog.LevelInfo,
	"warn": slog.LevelWarn, "warning": slog.LevelWarn,
	"error": slog.LevelError, "critical": slog.LevelError, "fatal": slog.LevelError, "panic": slog.LevelError,
}

// parseCmdline parses the agent's parameters on line, the kernel's command line. The parameters have the same names as
// those of Kata's agent. parseCmdline returns a warning for each parameter that it cannot use. Such a parameter must
// not stop the boot, because the command line is often written for Kata's agent.
func parseCmdline(line string) (level slog.Level, warnings []string) {
	for parameter := range strings.FieldsSeq(line) {
		key, value, _ := strings.Cut(parameter, "=")
		key, isAgent := strings.CutPrefix(key, "agent.")
		if !isAgent {
			continue
		}
		if key != "log" {
			warnings = append(warnings, parameter+": not supported by this agent")
			continue
		}
		l, ok := logLevels[value]
		if !ok {
			warnings = append(warnings, parameter+": unknown log level")
			continue
		}
		level = l
	}
	return level, warnings
}
