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

// parseCmdline reads the agent's parameters, which have the names of Kata's. What it cannot use becomes a
// warning and never stops the boot: the command line is often made for another agent.
func parseCmdline(line string) (level slog.Level, warnings []string) {
	for parameter := range strings.FieldsSeq(line) {
		key, value, _ := strings.Cut(parameter, "=")
		key, ours := strings.CutPrefix(key, "agent.")
		if !ours {
			continue
		}
		if key != "log" {
			warnings = append(warnings, parameter+": this agent does not have it")
			continue
		}
		l, ok := logLevels[value]
		if !ok {
			warnings = append(warnings, parameter+": unknown level")
			continue
		}
		level = l
	}
	return level, warnings
}
