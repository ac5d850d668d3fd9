package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"math"
	"slices"
	"strconv"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/audit"
)

var auditTail = &cli.Command{
	Name:      "tail",
	Usage:     "print the last entries of the audit log",
	UsageText: "msb server audit tail [options]",
	Description: "Each line shows the time, the action, who did it, and its target. --json prints the entries as they are in\n" +
		"the log, one per line.",
	Flags: []cli.Flag{
		&cli.IntFlag{Name: "last", Aliases: []string{"n"}, Usage: "print the last `N` entries", Value: 10},
		&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "print new entries as they are added, until Ctrl-C"},
		jsonFlag,
	},
	Action: tailAudit,
}

func tailAudit(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	last := c.Int("last")
	if last < 0 || last > math.MaxInt32 {
		return usageError(c, "-n %d is out of range: must be 0 to %d", last, math.MaxInt32)
	}
	a := admin(c)
	defer a.Close()
	err := a.TailAudit(c.Context, last, c.Bool("follow"), func(line string) error {
		if !c.Bool(jsonFlag.Name) {
			line = formatEntry(line)
		}
		_, err := fmt.Fprintln(c.App.Writer, line)
		return err
	})
	if c.Context.Err() != nil {
		return nil // Ctrl-C
	}
	return err
}

// formatEntry formats a line of the log for people. It returns a line that it cannot parse unchanged.
func formatEntry(line string) string {
	var e audit.Entry
	if err := json.Unmarshal([]byte(line), &e); err != nil {
		return printable(line)
	}
	actor := e.Actor
	if uid, err := strconv.ParseUint(strings.TrimPrefix(actor, "uid:"), 10, 32); err == nil {
		if name := userName(uint32(uid)); name != "" {
			actor = name
		}
	}
	words := []string{e.Time.Local().Format("2006-01-02 15:04:05"), fmt.Sprintf("%-17s", e.Action), "by " + actor}
	if e.Target != "" {
		words = append(words, e.Target)
	}
	for _, key := range slices.Sorted(maps.Keys(e.Detail)) {
		words = append(words, key+"="+e.Detail[key])
	}
	return printable(strings.ReplaceAll(strings.Join(words, "  "), "\n", `\n`))
}
