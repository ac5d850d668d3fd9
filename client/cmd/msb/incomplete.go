package main

import (
	"strings"

	"mvdan.cc/sh/v3/syntax"
)

// incomplete reports whether more lines belong to an input of a REPL. text ends with a newline. It does not find every error:
// the interpreter does.
func incomplete(language, text string) bool {
	switch language {
	case "bash":
		_, err := syntax.NewParser().Parse(strings.NewReader(text), "")
		return err != nil && syntax.IsIncomplete(err)
	case "python":
		return incompletePython(text)
	}
	// An empty line ends the input, because scan takes a bracket or quote in a regular expression for an open one.
	return scan(text, "//", "`").open && !strings.HasSuffix(text, "\n\n")
}

// incompletePython reports whether a Python input goes on. A block ends with an empty line.
func incompletePython(text string) bool {
	s := scan(text, "#", `"""`, "'''")
	if s.open {
		return true
	}
	return s.block && !strings.HasSuffix(text, "\n\n")
}

// scanned is what scan finds.
type scanned struct {
	open  bool // a bracket, a string of several lines or a comment is open, or the last line ends with a backslash
	block bool // a line outside of brackets ends with a colon, or begins with @
}

// scan looks for what is open at the end of text. comment begins a comment that ends with its line. multiline are the quotes of
// strings that may have several lines; " and ' end with their line.
func scan(text, comment string, multiline ...string) (s scanned) {
	depth := 0
	last := byte('\n') // the last character of the line that is not white space
	for i := 0; i < len(text); i++ {
		rest := text[i:]
		quote := ""
		for _, q := range append(multiline, `"`, "'") {
			if strings.HasPrefix(rest, q) {
				quote = q
				break
			}
		}
		switch c := text[i]; {
		case quote != "":
			end := endOfString(text, i+len(quote), quote, len(quote) == 1 && quote != "`")
			if end < 0 {
				s.open = true
				return s
			}
			i, last = end-1, '"'
		case comment == "//" && strings.HasPrefix(rest, "/*"):
			end := strings.Index(rest[2:], "*/")
			if end < 0 {
				s.open = true
				return s
			}
			i += 2 + end + 1
		case strings.HasPrefix(rest, comment):
			i += strings.IndexByte(rest, '\n') - 1
		case strings.IndexByte("([{", c) >= 0:
			depth++
			last = c
		case strings.IndexByte(")]}", c) >= 0:
			depth--
			last = c
		case c == '@' && last == '\n' && depth <= 0:
			s.block = true
			last = c
		case c == '\n':
			s.block = s.block || last == ':' && depth <= 0
			s.open = last == '\\' || depth > 0
			last = '\n'
		case c != ' ' && c != '\t' && c != '\r':
			last = c
		}
	}
	return s
}

// endOfString returns the index after the end of a string whose content begins at i, or -1 if it has none. A string of one line
// ends before a newline.
func endOfString(text string, i int, quote string, oneLine bool) int {
	for ; i < len(text); i++ {
		switch {
		case text[i] == '\\':
			i++
		case strings.HasPrefix(text[i:], quote):
			return i + len(quote)
		case oneLine && text[i] == '\n':
			return i
		}
	}
	return -1
}
