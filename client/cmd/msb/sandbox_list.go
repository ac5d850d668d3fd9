package main

import (
	"fmt"
	"strconv"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
)

var sandboxList = &cli.Command{
	Name:      "list",
	Aliases:   []string{"ls", "ps"},
	Usage:     "list sandboxes",
	UsageText: "msb sandbox list [options]",
	Description: "With --namespace '*', msb lists the sandboxes in every namespace that the key may access. Sandboxes that have\n" +
		"failed are listed with the reason until they are started again or stopped.\n\n" +
		callExitCodes,
	Flags: []cli.Flag{namespaceFlag, jsonFlag, serverURLFlag, verboseFlag},
	Action: func(c *cli.Context) error {
		if c.NArg() > 0 {
			return usageError(c, "unexpected argument %q; to show one sandbox: msb inspect %[1]s", c.Args().First())
		}
		if err := noArguments(c); err != nil {
			return err
		}
		res := rpc.ListResult{Sandboxes: []rpc.SandboxInfo{}} // not null
		err := callServer(c, "", func(r *client.Client) error {
			list, err := r.ListSandboxes(c.Context, c.String(namespaceFlag.Name))
			res.Sandboxes = append(res.Sandboxes, list...)
			return err
		})
		if err != nil {
			return withCallExitCode(err)
		}
		if c.Bool(jsonFlag.Name) {
			return printJSON(c, res)
		}
		if len(res.Sandboxes) == 0 {
			return printNone(c, "sandboxes", c.String(namespaceFlag.Name))
		}
		rows := [][]string{{"NAMESPACE", "NAME", "STATE", "IMAGE", "CPUS", "MEMORY", "DISK", "AGE", "ID", "REASON"}}
		for _, s := range res.Sandboxes {
			rows = append(rows, []string{
				s.Namespace, s.Name, string(s.State), s.Image, strconv.Itoa(s.CPUs), mebibytes(s.Memory), diskSize(s.Disk),
				age(time.Since(s.CreatedAt)), s.ID, oneLine(s.Reason),
			})
		}
		return printTable(c.App.Writer, rows)
	},
}

var sandboxInspect = &cli.Command{
	Name:        "inspect",
	Usage:       "show the state and the configuration of a sandbox",
	UsageText:   "msb sandbox inspect [options] NAME",
	Description: callExitCodes,
	Flags:       []cli.Flag{namespaceFlag, jsonFlag, serverURLFlag, verboseFlag},
	Action: func(c *cli.Context) error {
		name, err := oneSandbox(c)
		if err != nil {
			return err
		}
		var s *rpc.SandboxInfo
		err = callServer(c, name, func(r *client.Client) (err error) {
			s, err = r.Sandbox(c.String(namespaceFlag.Name), name).Get(c.Context)
			return err
		})
		if err != nil {
			return withCallExitCode(err)
		}
		if c.Bool(jsonFlag.Name) {
			return printJSON(c, s)
		}
		state := string(s.State)
		if s.Reason != "" {
			state += ": " + oneLine(s.Reason)
		}
		return printTable(c.App.Writer, [][]string{
			{"name", s.Name},
			{"namespace", s.Namespace},
			{"id", s.ID},
			{"state", state},
			{"image", s.Image},
			{"CPUs", strconv.Itoa(s.CPUs)},
			{"memory", mebibytes(s.Memory)},
			{"disk", diskSize(s.Disk)},
			{"started", fmt.Sprintf("%s, %s ago", s.CreatedAt.Local().Format("2006-01-02 15:04:05 MST"), age(time.Since(s.CreatedAt)))},
		})
	},
}
