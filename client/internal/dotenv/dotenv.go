// Package dotenv reads and changes .env files, which have lines NAME=value. It has no other imports than the standard
// library, so that its fuzz targets build quickly.
package dotenv

import (
	"bytes"
	"fmt"
	"regexp"
	"strings"
)

// assignment matches the part of a line in a .env file that precedes the value.
var assignment = regexp.MustCompile(`^[ \t]*(?:export[ \t]+)?([\w.-]+)[ \t]*(=?)[ \t]*`)

// Lookup returns the value of a variable in the text of a .env file, or "" if it is not set. It supports
// what the popular dotenv tools agree on: lines NAME=value, optionally after export; values without quotes or in
// single or double quotes; quoted values of several lines; comments after #; if a name occurs several times, the
// last value counts. Nothing is interpolated. Malformed lines are skipped, except those of the variable itself,
// which are an error. The error contains the line's number, but none of its text, which may be secret.
func Lookup(text, name string) (value string, err error) {
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

// readValue reads the value at the beginning of text. rest is the text after its last line. If the value is
// malformed, problem says how.
func readValue(text string, assigned bool) (value, rest, problem string) {
	line, next, _ := strings.Cut(text, "\n")
	switch {
	case !assigned:
		return "", next, "there is no = after the name"
	case strings.HasPrefix(text, `"`), strings.HasPrefix(text, "'"):
		value, after, ok := unquote(text)
		if !ok {
			return "", next, "the closing quote is missing"
		}
		line, rest, _ := strings.Cut(after, "\n")
		if trimUnquoted(line) != "" {
			return "", next, "there is text after the quoted value"
		}
		return value, rest, ""
	default:
		return trimUnquoted(line), next, ""
	}
}

var comment = regexp.MustCompile(`(^|[ \t])#.*`)

// trimUnquoted returns the rest of a line without a comment and surrounding space: an unquoted value.
func trimUnquoted(line string) string {
	return strings.TrimSpace(comment.ReplaceAllString(line, ""))
}

// escapes maps the character after a backslash to its meaning, for each kind of quote. Other sequences are kept
// unchanged.
var escapes = map[byte]map[byte]byte{
	'"':  {'n': '\n', 'r': '\r', 't': '\t', '"': '"', '\'': '\'', '\\': '\\', '$': '$'},
	'\'': {'\'': '\'', '\\': '\\'},
}

// unquote reads the quoted string at the beginning of text. rest is the text after it. ok is false if the closing
// quote is missing.
func unquote(text string) (value, rest string, ok bool) {
	quote := text[0]
	var b strings.Builder
	for i := 1; i < len(text); i++ {
		switch c := text[i]; {
		case c == quote:
			return b.String(), text[i+1:], true
		case c == '\\' && i+1 < len(text):
			i++
			if char, known := escapes[quote][text[i]]; known {
				b.WriteByte(char)
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

// Set replaces the value in every line that sets the variable, so that no reader of the file finds an old value.
// If there is no such line, it adds one. The value must not need quotes.
func Set(content []byte, name, value string) []byte {
	assignment := regexp.MustCompile(`^([ \t]*(?:export[ \t]+)?)` + regexp.QuoteMeta(name) + `[ \t]*=`)
	var out bytes.Buffer
	ending, found := "\n", false
	for i, line := range bytes.SplitAfter(content, []byte("\n")) {
		text := bytes.TrimRight(line, "\r\n")
		if i == 0 && bytes.HasSuffix(line, []byte("\r\n")) {
			ending = "\r\n"
		}
		set := assignment.FindSubmatch(text)
		if set == nil {
			out.Write(line)
			continue
		}
		found = true
		fmt.Fprintf(&out, "%s%s=%s%s", set[1], name, value, line[len(text):])
	}
	if !found {
		if len(content) > 0 && content[len(content)-1] != '\n' {
			out.WriteString(ending)
		}
		fmt.Fprintf(&out, "%s=%s%s", name, value, ending)
	}
	return out.Bytes()
}
