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
)

var jsonFlag = &cli.BoolFlag{Name: "json", Usage: "print JSON, for scripts"}

func printJSON(c *cli.Context, v any) error {
	e := json.NewEncoder(c.App.Writer)
	e.SetIndent("", "  ")
	return e.Encode(v)
}

// table prints rows in columns; the first is the heading.
func table(w io.Writer, rows [][]string) error {
	return paintedTable(w, rows, func(int) colour { return plain })
}

// paintedTable prints each row in a colour, if w is a terminal that wants colours.
func paintedTable(w io.Writer, rows [][]string, paint func(row int) colour) error {
	var out strings.Builder
	t := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	lines := make([]int, len(rows)) // of each row: a cell may have several
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
			if _, err := fmt.Fprintln(w, painted(w, paint(i), strings.TrimRight(line, " "))); err != nil {
				return err
			}
		}
	}
	return nil
}

// printable makes visible what would command a terminal, or reorder its text. Some of what is shown here
// comes from inside sandboxes.
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

// colour is a terminal's parameter for it.
type colour string

const (
	plain  colour = ""
	red    colour = "31"
	green  colour = "32"
	yellow colour = "33"
	dim    colour = "2"
)

func painted(w io.Writer, c colour, text string) string {
	if c == plain || !isTerminal(w) || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return text
	}
	return "\x1b[" + string(c) + "m" + text + "\x1b[0m"
}

// folded breaks text into lines that fit between the indent and a terminal's right edge. What is no terminal
// gets one line, which scripts can search.
func folded(w io.Writer, text string, indent int) string {
	f, ok := w.(*os.File)
	if !ok {
		return text
	}
	columns, _, err := term.GetSize(int(f.Fd()))
	if err != nil || columns-indent < 30 { // no terminal, or one too narrow to help
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

// isTerminal says whether a reader or writer is one.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// jsonTime is an RFC 3339 time, or null.
func jsonTime(t *timestamppb.Timestamp) *time.Time {
	if t == nil {
		return nil
	}
	at := t.AsTime()
	return &at
}

// localTime is a moment as people here read it.
func localTime(t *timestamppb.Timestamp) string {
	return t.AsTime().Local().Format("2006-01-02 15:04:05 MST")
}

// age is a duration in the one or two units that matter.
func age(d time.Duration) string {
	switch {
	case d < time.Second:
		return "0s"
	case d < time.Minute:
		return d.Truncate(time.Second).String()
	case d < time.Hour:
		return fmt.Sprintf("%dm%ds", d/time.Minute, d%time.Minute/time.Second)
	case d < 24*time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	default:
		return fmt.Sprintf("%dd%dh", d/(24*time.Hour), d%(24*time.Hour)/time.Hour)
	}
}

// size is a number of bytes in a unit that fits.
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

// userName is what this host calls a user, or nothing.
func userName(uid uint32) string {
	u, err := user.LookupId(strconv.FormatUint(uint64(uid), 10))
	if err != nil {
		return ""
	}
	return u.Username
}
