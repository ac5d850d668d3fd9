package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

var auditSeal = &cli.Command{
	Name:      "seal",
	Usage:     "seal the file of the audit log, so that it can be archived",
	UsageText: "msb server audit seal [options]",
	Description: "The file audit.jsonl becomes a sealed segment with a name of its own, and the server continues the log in a\n" +
		"new file. It prints the path of the segment. Nothing is added to a segment anymore, so you can move it to an archive.\n" +
		"The server remembers where each segment begins and ends, and the chain of hashes continues in the new file.\n" +
		"If the log has no entries since it was last sealed, nothing happens.",
	Flags:  []cli.Flag{jsonFlag},
	Action: sealAudit,
}

// segmentInfo describes a sealed segment of the log.
type segmentInfo struct {
	Path   string `json:"path"`
	First  uint64 `json:"first"`
	Last   uint64 `json:"last"`
	Hash   string `json:"hash"`
	Absent bool   `json:"absent"`
}

func newSegmentInfo(s *adminv1.AuditSegment) segmentInfo {
	return segmentInfo{s.GetPath(), s.GetFirst(), s.GetLast(), s.GetHash(), s.GetAbsent()}
}

func sealAudit(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	a := admin(c)
	defer a.Close()
	segment, err := a.SealAudit(c.Context)
	if err != nil {
		return err
	}
	if segment == nil {
		fmt.Fprintln(c.App.ErrWriter, "the audit log has no entries since it was last sealed")
		if c.Bool(jsonFlag.Name) {
			return printJSON(c, nil)
		}
		return nil
	}
	if c.Bool(jsonFlag.Name) {
		return printJSON(c, newSegmentInfo(segment))
	}
	fmt.Fprintln(c.App.Writer, printable(segment.GetPath()))
	return nil
}
