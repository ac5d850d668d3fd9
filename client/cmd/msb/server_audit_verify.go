package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/audit"
	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

var auditVerify = &cli.Command{
	Name:      "verify",
	Usage:     "check that the audit log is complete and unchanged",
	UsageText: "msb server audit verify [options]",
	Description: "The running server checks its own log up to the last entry recorded in its key store, so it detects changed,\n" +
		"missing and added entries, and a truncated log. With --file, msb checks a copy of the log without the server.\n" +
		"A copy cannot show whether entries were added since; compare the hash of its last entry with the server's.\n\n" +
		"Exit codes: 0 the log is complete and unchanged; 1 it is not, or it could not be checked; 2 invalid usage.",
	Flags: []cli.Flag{
		&cli.StringFlag{Name: "file", Usage: "check the copy of the log in `FILE`"},
		jsonFlag,
	},
	Action: verifyAudit,
}

// auditInfo is the result of the check of a log.
type auditInfo struct {
	Path    string `json:"path"`
	Entries uint64 `json:"entries"`
	Hash    string `json:"hash"`
	Problem string `json:"problem,omitempty"`
}

func verifyAudit(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	info, err := auditInfo{}, error(nil)
	if path := c.String("file"); path != "" {
		info, err = verifyFile(path)
	} else {
		a := admin(c)
		defer a.Close()
		var resp *adminv1.VerifyAuditResponse
		resp, err = a.VerifyAudit(c.Context)
		info = auditInfo{resp.GetPath(), resp.GetEntries(), resp.GetHash(), resp.GetProblem()}
	}
	if err != nil {
		return err
	}
	switch {
	case c.Bool(jsonFlag.Name):
		err = printJSON(c, info)
		if err == nil && info.Problem != "" {
			err = cli.Exit("", exitFailure)
		}
	case info.Problem != "":
		err = fmt.Errorf("%s is damaged after %s: %s", info.Path, plural(info.Entries, "valid entry", "valid entries"), info.Problem)
	case info.Entries == 0:
		fmt.Fprintf(c.App.Writer, "%s is empty\n", printable(info.Path))
	default:
		fmt.Fprintf(c.App.Writer, "%s is complete and unchanged: %s, the hash of the last entry is %s\n", printable(info.Path),
			plural(info.Entries, "entry", "entries"), info.Hash)
	}
	return err
}

func verifyFile(path string) (auditInfo, error) {
	f, err := os.Open(path)
	if err != nil {
		return auditInfo{}, err
	}
	defer f.Close()
	head, err := audit.Verify(f)
	info := auditInfo{Path: path, Entries: head.Seq, Hash: head.Hash}
	if broken, ok := errors.AsType[*audit.ChainError](err); ok {
		info.Problem, err = fmt.Sprintf("line %d: %s", broken.Line, broken.Problem), nil
	}
	return info, err
}
