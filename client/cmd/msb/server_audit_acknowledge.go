package main

import (
	"fmt"

	"github.com/urfave/cli/v2"
)

var auditAcknowledge = &cli.Command{
	Name:      "acknowledge",
	Usage:     "acknowledge the problems of the audit log",
	UsageText: "msb server audit acknowledge [options]",
	Description: "The server keeps each problem that it finds in the audit log, such as lines that somebody has removed, and shows\n" +
		"it in 'msb server status', even if it has repaired the log. This command prints the problems, records them in the\n" +
		"log, and removes them from the status. It repairs nothing.",
	Flags:  []cli.Flag{jsonFlag},
	Action: acknowledgeAudit,
}

func acknowledgeAudit(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	a := admin(c)
	defer a.Close()
	problems, err := a.AcknowledgeAudit(c.Context)
	if err != nil {
		return err
	}
	if c.Bool(jsonFlag.Name) {
		return printJSON(c, map[string][]string{"problems": append([]string{}, problems...)})
	}
	for _, problem := range problems {
		fmt.Fprintln(c.App.Writer, "acknowledged:", printable(problem))
	}
	if len(problems) == 0 {
		fmt.Fprintln(c.App.Writer, "the audit log has no known problems")
	}
	return nil
}
