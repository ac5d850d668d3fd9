package client

import (
	"fmt"
	"regexp"
	"strings"
)

// assignment is the part of a line of a .env file before its value.
var assignment = regexp.MustCompile(`^[ \t]*(?:export[ \t]+)?([\w.-]+)[ \t]*(=?)[ \t]*`)

// lookupDotenv finds a variable in the text of a .env file. It reads what the popular dotenv tools read alike:
// NAME=value lines with an optional export before them, values bare or in quotes, quoted ones over several
// lines, comments behind a #, and the last one of a name. Nothing is interpolated. Lines in no such form are
// passed over, unless they are for the name that is asked for: its error has the line's number, and nothing of
// its text. Without the variable, the value is empty.
func lookupDotenv(text, name string) (value string, err error) {
	text = strings.NewReplacer("\r\n", "\n", "\r", "\n").Replace(strings.TrimPrefix(text, "\ufeff"))
	for number := 1; text != ""; {
		line, next, _ := strings.Cut(text, "\n")
		if match := assignment.FindStringSubmatch(line); match != nil {
			v, rest, problem := readValue(text[len(match[0]):], match[2] == "=")
			switch {
			case match[1] == name && problem != "":
				return "", fmt.Errorf("line %d: %s", number, problem)
			case match[1] == name:
				value = v
			}
			next = rest
		}
		number += strings.Count(text[:len(text)-len(next)], "\n")
		text = next
	}
	return value, nil
}

// readValue reads the value at the beginning of text, and returns what follows its line. When there is none,
// it says what the problem is.
func readValue(text string, assigned bool) (value, rest, problem string) {
	line, next, _ := strings.Cut(text, "\n")
	switch {
	case !assigned:
		return "", next, "there is no = behind the name"
	case strings.HasPrefix(text, `"`), strings.HasPrefix(text, "'"):
		value, behind, ok := unquote(text)
		if !ok {
			return "", next, "the quote that begins the value has no end"
		}
		line, rest, _ := strings.Cut(behind, "\n")
		if bare(line) != "" {
			return "", next, "there is something behind the quoted value"
		}
		return value, rest, ""
	default:
		return bare(line), next, ""
	}
}

var comment = regexp.MustCompile(`(^|[ \t])#.*`)

// bare is an unquoted value: its line without a comment.
func bare(line string) string {
	return strings.TrimSpace(comment.ReplaceAllString(line, ""))
}

// escapes are the sequences behind a backslash, for each quote. Any other one stays as it is.
var escapes = map[byte]map[byte]byte{
	'"':  {'n': '\n', 'r': '\r', 't': '\t', '"': '"', '\'': '\'', '\\': '\\', '$': '$'},
	'\'': {'\'': '\'', '\\': '\\'},
}

// unquote reads the quoted string at the beginning of text, and returns what follows it.
func unquote(text string) (value, rest string, ok bool) {
	quote := text[0]
	var b strings.Builder
	for i := 1; i < len(text); i++ {
		switch c := text[i]; {
		case c == quote:
			return b.String(), text[i+1:], true
		case c == '\\' && i+1 < len(text):
			i++
			if meant, known := escapes[quote][text[i]]; known {
				b.WriteByte(meant)
			} else {
				b.WriteByte(c)
				b.WriteByte(text[i])
			}
		default:
			b.WriteByte(c)
		}
	}
	return "", "", false
}
