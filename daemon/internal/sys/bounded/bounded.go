// Package bounded makes text from outside safe to show: printable, and of limited length. Code in a sandbox and clients
// choose the text of some errors, and the text must fill neither the log nor the memory, nor control a terminal.
package bounded

import (
	"strconv"
	"strings"
	"unicode/utf8"
)

// Text returns s as valid UTF-8 that takes at most max bytes as a JSON string. If s is longer, Text cuts it and appends
// "…", which is not counted. It keeps newlines and tabs, and escapes other characters that are not printable, such as
// \x1b.
func Text(s string, max int) string {
	if isPlain(s, max) {
		return s
	}
	var b strings.Builder
	for size := 0; s != ""; {
		r, n := utf8.DecodeRuneInString(s)
		piece, cost := s[:n], n
		switch {
		case r == utf8.RuneError && n == 1: // not valid UTF-8
			piece, cost = "\uFFFD", len("\uFFFD")
		case r == '\n', r == '\t', r == '"', r == '\\':
			cost++ // JSON escapes it
		case !strconv.IsPrint(r):
			piece = strings.Trim(strconv.QuoteRune(r), "'")
			cost = len(piece) + 1 // JSON escapes the backslash
		}
		if size += cost; size > max {
			b.WriteString("…")
			break
		}
		b.WriteString(piece)
		s = s[n:]
	}
	return b.String()
}

// Short is Text with a limit of 100 bytes, for what a client sent and an error quotes.
func Short(s string) string { return Text(s, 100) }

// isPlain reports whether s is short and has only characters that need no escape.
func isPlain(s string, max int) bool {
	if len(s) > max {
		return false
	}
	for i := range len(s) {
		if c := s[i]; c < ' ' || c >= 0x7f || c == '"' || c == '\\' {
			return false
		}
	}
	return true
}
