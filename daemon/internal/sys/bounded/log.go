package bounded

import (
	"fmt"
	"io"
	"log/slog"
)

// maxAttr limits each attribute of a log line, in bytes. It leaves room for the first frames of a stack.
const maxAttr = 2 << 10

// NewLogger returns a logger that writes lines of JSON or of key=value pairs to w. It bounds every message and every
// attribute as Text does, wherever they come from.
func NewLogger(w io.Writer, json bool, level slog.Leveler) *slog.Logger {
	options := &slog.HandlerOptions{Level: level, ReplaceAttr: boundAttr}
	if json {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// boundAttr implements slog.HandlerOptions.ReplaceAttr.
func boundAttr(_ []string, a slog.Attr) slog.Attr {
	switch a.Value.Kind() {
	case slog.KindString:
		a.Value = slog.StringValue(Text(a.Value.String(), maxAttr))
	case slog.KindAny:
		switch v := a.Value.Any().(type) {
		case slog.Level, nil:
		case error:
			a.Value = slog.StringValue(Text(v.Error(), maxAttr))
		default: // a list, for example
			if text := fmt.Sprintf("%+v", v); Text(text, maxAttr) != text {
				a.Value = slog.StringValue(Text(text, maxAttr))
			}
		}
	}
	return a
}
