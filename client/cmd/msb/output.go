package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/user"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/urfave/cli/v2"
	"golang.org/x/term"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/msbd/msbd/api/rpc"
)

var jsonFlag = &cli.BoolFlag{Name: "json", Usage: "print JSON"}

func printJSON(c *cli.Context, v any) error {
	e := json.NewEncoder(c.App.Writer)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// printTable prints rows with aligned columns. The first row is the heading.
func printTable(w io.Writer, rows [][]string) error {
	return printColored(w, rows, func(int) color { return plain })
}

// printColored is like printTable, but prints each row in the color that colorOf returns, if w is a terminal and
// colors are not disabled.
func printColored(w io.Writer, rows [][]string, colorOf func(row int) color) error {
	var out strings.Builder
	t := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	lines := make([]int, len(rows)) // the number of lines of each row, because a cell may have several
	for i, row := range rows {
		text := printable(strings.Join(row, "\t"))
		lines[i] = strings.Count(text, "\n") + 1
		fmt.Fprintln(t, text)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	rest := out.String()
	for i := range rows {
		for range lines[i] {
			var line string
			line, rest, _ = strings.Cut(rest, "\n")
			if _, err := fmt.Fprintln(w, colored(w, colorOf(i), strings.TrimRight(line, " "))); err != nil {
				return err
			}
		}
	}
	return nil
}

// printable escapes characters that could control a terminal or reorder its text, because some of the text that msb
// prints comes from inside sandboxes.
func printable(text string) string {
	var out strings.Builder
	for _, r := range text {
		switch {
		case r == '\n', r == '\t', !unicode.In(r, unicode.Cc, unicode.Cf):
			out.WriteRune(r)
		default:
			out.WriteString(strings.Trim(strconv.QuoteRuneToASCII(r), "'"))
		}
	}
	return out.String()
}

// printNone says on standard error that a list is empty, because a table without rows looks like a mistake. namespace is
// the one that was listed, or empty if none was given.
func printNone(c *cli.Context, what, namespace string) error {
	where := ""
	switch namespace {
	case "":
	case rpc.AllNamespaces:
		where = " in any namespace of this key"
	default:
		where = " in namespace " + namespace
	}
	_, err := fmt.Fprintln(c.App.ErrWriter, "no "+what+printable(where))
	return err
}

// diskSize formats the size of a disk, which is 0 if it is not limited.
func diskSize(mib int) string {
	if mib == 0 {
		return "-"
	}
	return mebibytes(mib)
}

// mebibytes formats a size of memory or of a disk.
func mebibytes(mib int) string {
	if mib >= 1024 && mib%1024 == 0 {
		return fmt.Sprintf("%d GiB", mib/1024)
	}
	return fmt.Sprintf("%d MiB", mib)
}

// oneLine replaces line breaks and tabs, which would split the columns of a table, by spaces.
func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

// color is the parameter of a terminal's escape sequence for a color.
type color string

const (
	plain  color = ""
	red    color = "31"
	green  color = "32"
	yellow color = "33"
	dim    color = "2"
)

// colored returns text in a color, or unchanged if w is not a terminal or colors are disabled.
func colored(w io.Writer, c color, text string) string {
	if c == plain || !isTerminal(w) || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return text
	}
	return "\x1b[" + string(c) + "m" + text + "\x1b[0m"
}

// wrapped breaks text into lines that fit between the indent and the right edge of the terminal w. If w is not a
// terminal, it returns text as one line, so that scripts can search it.
func wrapped(w io.Writer, text string, indent int) string {
	f, ok := w.(*os.File)
	if !ok {
		return text
	}
	columns, _, err := term.GetSize(int(f.Fd()))
	if err != nil || columns-indent < 30 { // not a terminal, or too narrow
		return text
	}
	var out strings.Builder
	used := 0
	for i, word := range strings.Fields(text) {
		switch length := utf8.RuneCountInString(word); {
		case i == 0:
			used = length
		case indent+used+1+length > columns:
			out.WriteString("\n" + strings.Repeat(" ", indent))
			used = length
		default:
			out.WriteByte(' ')
			used += 1 + length
		}
		out.WriteString(word)
	}
	return out.String()
}

// isTerminal reports whether a reader or writer is a terminal.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// jsonTime returns a time that is marshalled in the RFC 3339 format, or nil if t is nil.
func jsonTime(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	at := t.AsTime()
	return &at
}

// localTime formats a time in the local time zone.
func localTime(t *timestamppb.Timestamp) string {
	return t.AsTime().Local().Format("2006-01-02 15:04:05 MST")
}

// age formats a duration in its one or two largest units, such as 3h20m.
func age(d time.Duration) string {
	const year = 365 * 24 * time.Hour
	switch {
	case d < time.Second:
		return "0s"
	case d < time.Minute:
		return d.Truncate(time.Second).String()
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", d/time.Minute, d%time.Minute/time.Second)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	case d < year:
		return fmt.Sprintf("%dd%dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
	default:
		return fmt.Sprintf("%dy%dd", d/year, d%year/(24*time.Hour))
	}
}

// size formats a number of bytes with a suitable unit, such as 3.0 MiB.
func size(bytes int64) string {
	const unit = 1024
	n, suffix := float64(bytes), "B"
	for _, larger := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if n < unit {
			break
		}
		n, suffix = n/unit, larger
	}
	if suffix == "B" {
		return fmt.Sprintf("%d B", bytes)
	}
	return fmt.Sprintf("%.1f %s", n, suffix)
}

// plural formats a count with its noun: "no checks", "1 check", "2 checks".
func plural[N int | int32 | uint64](n N, one, many string) string {
	switch n {
	case 0:
		return "no " + many
	case 1:
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}

// userName returns the name of a user on this host, or "" if the user has none.
func userName(uid uint32) string {
	u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10))
	if err != nil {
		return ""
	}
	return u.Username
}
