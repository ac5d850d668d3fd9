package agent

import (
	"fmt"
	"log/slog"
	"strings"
)

// bootOptions are what the kernel's command line asks of the agent, in the names of Kata's.
type bootOptions struct {
	logLevel slog.Level
}

var logLevels = map[string]slog.Level{
	"trace": slog.LevelDebug, "debug": slog.LevelDebug, "info": slog.LevelInfo,
	"warn": slog.LevelWarn, "warning": slog.LevelWarn,
	"error": slog.LevelError, "critical": slog.LevelError, "fatal": slog.LevelError, "panic": slog.LevelError,
}

// parseCmdline reads the agent's parameters. What it cannot use becomes a warning and never stops
// the boot: the command line is often made for another agent.
func parseCmdline(line string) (o bootOptions, warnings []string) {
	for parameter := range strings.FieldsSeq(line) {
		key, value, _ := strings.Cut(parameter, "=")
		key, ours := strings.CutPrefix(key, "agent.")
		if !ours {
			continue
		}
		var err error
		switch key {
		case "log":
			level, ok := logLevels[value]
			if !ok {
				err = fmt.Errorf("unknown level")
			}
			o.logLevel = level
		default:
			err = fmt.Errorf("this agent does not have it")
		}
		if err != nil {
			warnings = append(warnings, fmt.Sprintf("%s: %v", parameter, err))
		}
	}
	return o, warnings
}
