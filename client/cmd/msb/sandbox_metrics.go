package main

import (
	"strconv"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
)

var sandboxMetrics = &cli.Command{
	Name:      "metrics",
	Usage:     "show the resource usage of sandboxes",
	UsageText: "msb sandbox metrics [options] [NAME]",
	Description: "Without NAME, msb lists all sandboxes in the namespace. With --namespace '*', it lists those in every namespace\n" +
		"that the key may access. CPU is in percent of one processor. With --json, cpu_usage is in percent of one\n" +
		"processor, memory_usage in MiB and disk_usage in bytes.\n\n" +
		callExitCodes,
	Flags:  []cli.Flag{namespaceFlag, jsonFlag, serverURLFlag, verboseFlag},
	Action: measureSandboxes,
}

func measureSandboxes(c *cli.Context) error {
	if c.NArg() > 1 {
		return usageError(c, "give the name of one sandbox, or none to list all")
	}
	if err := checkNotEmpty(c); err != nil {
		return err
	}
	name, namespace := c.Args().First(), c.String(namespaceFlag.Name)
	res := rpc.MetricsResult{Sandboxes: []rpc.SandboxMetrics{}} // not null
	err := callServer(c, name, func(r *client.Client) error {
		if name == "" {
			list, err := r.Metrics(c.Context, namespace)
			res.Sandboxes = append(res.Sandboxes, list...)
			return err
		}
		one, err := r.Sandbox(namespace, name).Metrics(c.Context)
		if err == nil {
			res.Sandboxes = append(res.Sandboxes, *one)
		}
		return err
	})
	if err != nil {
		return withCallExitCode(err)
	}
	if c.Bool(jsonFlag.Name) {
		return printJSON(c, res)
	}
	if len(res.Sandboxes) == 0 {
		return printNone(c, "sandboxes", namespace)
	}
	rows := [][]string{{"NAMESPACE", "NAME", "STATE", "CPU", "MEMORY", "DISK"}}
	for _, m := range res.Sandboxes {
		state, cpu, memory, disk := string(m.State), "-", "-", "-"
		if state == "" { // a server that is older than msb
			if state = "not running"; m.Running {
				state = string(rpc.StateRunning)
			}
		}
		if m.CPUUsage != nil {
			cpu = strconv.FormatFloat(*m.CPUUsage, 'f', 1, 64) + " %"
		}
		if m.MemoryUsage != nil {
			memory = mebibytes(int(*m.MemoryUsage))
		}
		if m.DiskUsage != nil {
			disk = size(*m.DiskUsage)
		}
		rows = append(rows, []string{m.Namespace, m.Name, state, cpu, memory, disk})
	}
	return printTable(c.App.Writer, rows)
}
