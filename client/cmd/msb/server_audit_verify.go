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
	Usage:     "check that nobody changed the audit log",
	UsageText: "msb server audit verify [--json]\nmsb server audit verify --file FILE [--json]",
	Description: "The running server checks its own log, to the end that its key store vouches for: a changed, missing or\n" +
		"added entry is found, and so is a log that was cut short. A copy in a FILE is checked here, without the\n" +
		"server; that it goes on elsewhere cannot be seen in it: compare the hash of its last entry.\n\n" +
		"Exit codes: 0 it is whole; 1 it is not, or it cannot be told; 2 bad usage.",
	Flags: []cli.Flag{
		&cli.StringFlag{Name: "file", Usage: "check the log in `FILE`"},
		jsonFlag,
	},
	Action: verifyAudit,
}

// auditInfo says how far a log is good.
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
		err = fmt.Errorf("%s is not as it was written. Its first %d entries are good; then: %s", info.Path, info.Entries, info.Problem)
	case info.Entries == 0:
		fmt.Fprintf(c.App.Writer, "%s is empty\n", printable(info.Path))
	default:
		fmt.Fprintf(c.App.Writer, "%s is whole: %d entries, the last one's hash is %s\n", printable(info.Path), info.Entries, info.Hash)
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
