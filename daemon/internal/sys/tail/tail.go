// Package tail reads the ends of log files for error messages. A guest may have written a log, so the package removes
// characters that could change the terminal of a reader or the order of the text. Every package of the daemon may import it.
package tail

import (
	"io"
	"os"
	"strings"
	"unicode"
)

// Read returns at most the last n bytes of the file at path, without what is not printable other than newlines and tabs.
// It returns "" if the file cannot be read.
func Read(path string, n int64) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil && info.Size() > n {
		_, _ = f.Seek(-n, io.SeekEnd)
	}
	text, _ := io.ReadAll(io.LimitReader(f, n))
	return printable(string(text))
}

// Quote formats text, the end of a log, for an error message. The result begins with a newline and the log's name.
// Further lines of text are indented. Quote returns "" if text is empty.
func Quote(name, text string) string {
	if text = printable(text); text == "" {
		return ""
	}
	return "\n" + name + ": " + strings.ReplaceAll(text, "\n", "\n\t")
}

// printable removes what is not printable except newlines and tabs, such as control characters and marks that change
// the direction of text. It also removes invalid UTF-8, and white space around the text.
func printable(text string) string {
	return strings.TrimSpace(strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' || unicode.IsPrint(r) {
			return r
		}
		return -1
	}, strings.ToValidUTF8(text, "")))
}
