package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
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
		"missing and added entries, and a truncated log. It checks the sealed segments that are still in the state directory,\n" +
		"and lists those that are absent, with the number and the hash of their last entry.\n\n" +
		"With --file, msb checks copies of the log without the server: one file, or several consecutive ones. A copy cannot\n" +
		"show whether entries were added since; compare the hash of its last entry with the server's. If the first file\n" +
		"does not begin with entry 1, compare the hash before it with the last hash of the segment before it.\n\n" +
		"Exit codes: 0 the log is complete and unchanged; 1 it is not, or it could not be checked; 2 invalid usage.",
	Flags: []cli.Flag{
		&cli.StringSliceFlag{Name: "file", Usage: "check the copy of the log in `FILE`; repeat it for consecutive segments"},
		jsonFlag,
	},
	Action: verifyAudit,
}

// auditInfo is the result of the check of a log.
type auditInfo struct {
	Path    string `json:"path"`
	Entries uint64 `json:"entries"`
	Hash    string `json:"hash"`
	// First and Before are set if a copy does not begin with entry 1: the number of its first entry, and the hash of the
	// entry before it.
	First    uint64        `json:"first,omitempty"`
	Before   string        `json:"hash_before,omitempty"`
	Segments []segmentInfo `json:"segments,omitempty"`
	Problem  string        `json:"problem,omitempty"`
}

func verifyAudit(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	info, err := auditInfo{}, error(nil)
	if paths := c.StringSlice("file"); len(paths) > 0 {
		info, err = verifyFiles(paths)
	} else {
		a := admin(c)
		defer a.Close()
		var resp *adminv1.VerifyAuditResponse
		resp, err = a.VerifyAudit(c.Context)
		info = auditInfo{Path: resp.GetPath(), Entries: resp.GetEntries(), Hash: resp.GetHash(), Problem: resp.GetProblem()}
		for _, s := range resp.GetSegments() {
			info.Segments = append(info.Segments, newSegmentInfo(s))
		}
	}
	if err != nil {
		return err
	}
	if c.Bool(jsonFlag.Name) {
		err = printJSON(c, info)
		if err == nil && info.Problem != "" {
			err = cli.Exit("", exitFailure)
		}
		return err
	}
	for _, s := range info.Segments {
		if s.Absent {
			fmt.Fprintf(c.App.Writer, "%s is absent and was not checked: entries %d to %d, the hash of the last entry is %s\n",
				printable(s.Path), s.First, s.Last, s.Hash)
		}
	}
	switch {
	case info.Problem != "":
		if len(c.StringSlice("file")) == 0 { // the server's text names the damaged files
			info.Path = "the audit log"
		}
		return fmt.Errorf("%s is damaged after %s: %s", info.Path, plural(info.Entries, "valid entry", "valid entries"), info.Problem)
	case info.Entries == 0:
		fmt.Fprintf(c.App.Writer, "%s is empty\n", printable(info.Path))
	case info.First > 0:
		fmt.Fprintf(c.App.Writer, "%s is complete and unchanged: entries %d to %d, the hash of the last entry is %s, and the hash of the entry before is %s\n",
			printable(info.Path), info.First, info.Entries, info.Hash, info.Before)
	case len(info.Segments) > 0:
		fmt.Fprintf(c.App.Writer, "the audit log (%s and %s) is complete and unchanged: %s, the hash of the last entry is %s\n", printable(info.Path),
			plural(len(info.Segments), "sealed segment", "sealed segments"), plural(info.Entries, "entry", "entries"), info.Hash)
	default:
		fmt.Fprintf(c.App.Writer, "%s is complete and unchanged: %s, the hash of the last entry is %s\n", printable(info.Path),
			plural(info.Entries, "entry", "entries"), info.Hash)
	}
	return nil
}

// verifyFiles checks files that continue each other.
func verifyFiles(paths []string) (info auditInfo, err error) {
	var head audit.Head
	for i, path := range paths {
		f, err := os.Open(path)
		if err != nil {
			return info, fileError("read", path, err)
		}
		defer f.Close()
		if i == 0 {
			if head, err = audit.Before(f); err != nil {
				return info, err
			}
			if head.Seq > 0 {
				info.First, info.Before = head.Seq+1, head.Hash
			}
		}
		if first := firstEntry(f); i > 0 && first > 0 && first != head.Seq+1 {
			return info, fmt.Errorf("%s begins with entry %d, but entry %d is next: give the files in their order", path, first, head.Seq+1)
		}
		head, err = head.Verify(f)
		info.Path, info.Entries, info.Hash = path, head.Seq, head.Hash
		if broken, ok := errors.AsType[*audit.ChainError](err); ok {
			info.Problem = fmt.Sprintf("line %d: %s", broken.Line, broken.Problem)
			return info, nil
		}
		if err != nil {
			return info, err
		}
	}
	return info, nil
}

// firstEntry returns the number of the first entry in f, or 0 if the first line is not valid. It does not move the offset of f.
func firstEntry(f io.ReaderAt) uint64 {
	line, err := bufio.NewReader(io.NewSectionReader(f, 0, audit.MaxLine)).ReadBytes('\n')
	if err != nil {
		return 0
	}
	e, err := audit.Parse(bytes.TrimSuffix(line, []byte("\n")))
	if err != nil {
		return 0
	}
	return e.Seq
}
