package main

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

var serverList = &cli.Command{
	Name:      "list",
	Aliases:   []string{"ls", "ps"},
	Usage:     "list the server's sandboxes",
	UsageText: "msb server list [options]",
	Flags:     []cli.Flag{listNamespaceFlag, jsonFlag},
	Action: func(c *cli.Context) error {
		if err := noArguments(c); err != nil {
			return err
		}
		return listSandboxes(c, nil)
	},
}

var listNamespaceFlag = &cli.StringFlag{Name: "namespace", Aliases: []string{"n"}, Usage: "list only sandboxes in namespace `NS`"}

type sandboxInfo struct {
	Namespace string     `json:"namespace"`
	Name      string     `json:"name"`
	ID        string     `json:"id"`
	State     string     `json:"state"`
	Reason    string     `json:"reason,omitempty"`
	Image     string     `json:"image"`
	CPUs      int32      `json:"cpus"`
	MemoryMiB int32      `json:"memory_mib"`
	DiskMiB   int32      `json:"disk_mib,omitempty"`
	CreatedAt *time.Time `json:"created_at"`
}

// listSandboxes prints the sandboxes with these names, or all sandboxes if names is empty. It is an error if a name has
// no sandbox.
func listSandboxes(c *cli.Context, names []string) error {
	a := admin(c)
	defer a.Close()
	sandboxes, err := a.Sandboxes(c.Context, c.String(listNamespaceFlag.Name))
	if err != nil {
		return err
	}
	if len(names) > 0 {
		for _, name := range names {
			if !slices.ContainsFunc(sandboxes, func(s *adminv1.Sandbox) bool { return s.GetName() == name }) {
				return fmt.Errorf("sandbox %q does not exist; 'msb server list' lists the existing ones", name)
			}
		}
		sandboxes = slices.DeleteFunc(sandboxes, func(s *adminv1.Sandbox) bool { return !slices.Contains(names, s.GetName()) })
	}
	if c.Bool(jsonFlag.Name) {
		list := []sandboxInfo{} // not null
		for _, s := range sandboxes {
			list = append(list, sandboxInfo{
				s.GetNamespace(), s.GetName(), s.GetId(), s.GetState(), s.GetReason(), s.GetImage(), s.GetCpus(), s.GetMemoryMib(), s.GetDiskMib(),
				jsonTime(s.GetCreatedAt()),
			})
		}
		return printJSON(c, list)
	}
	if len(sandboxes) == 0 {
		return printNone(c, "sandboxes", c.String(listNamespaceFlag.Name))
	}
	rows := [][]string{{"NAMESPACE", "NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "DISK", "AGE", "ID", "REASON"}}
	for _, s := range sandboxes {
		rows = append(rows, []string{
			s.GetNamespace(), s.GetName(), s.GetState(), s.GetImage(), strconv.Itoa(int(s.GetCpus())),
			mebibytes(int(s.GetMemoryMib())), diskSize(int(s.GetDiskMib())), age(time.Since(s.GetCreatedAt().AsTime())), s.GetId(),
			oneLine(s.GetReason()),
		})
	}
	return printTable(c.App.Writer, rows)
}
