package main

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
)

var (
	followFlag = &cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "go on to print what the process prints, until it ends"}
	signalFlag = &cli.StringFlag{Name: "signal", Aliases: []string{"s"}, Value: "TERM", Usage: "`SIGNAL` to send: a name or a number"}
	allFlag    = &cli.BoolFlag{Name: "all", Usage: "send the signal to everything that the process has started as well"}
)

// processCommands are the commands for processes that run in the background.
var processCommands = &cli.Command{
	Name:  "process",
	Usage: "list, show and end the processes of a sandbox that run in the background",
	Description: "'msb sandbox exec -d' starts such a process. PROCESS is a pid, or a tag, which stands for the newest process that\n" +
		"has it. Without PROCESS, the only process that runs is meant.",
	Subcommands: []*cli.Command{processList, processLogs, processKill},
}

var processList = &cli.Command{
	Name: "list", Aliases: []string{"ls", "ps"},
	Usage:       "list the processes of a sandbox, with those that have ended",
	UsageText:   "msb sandbox process list [options] NAME",
	Description: callExitCodes,
	Flags:       []cli.Flag{namespaceFlag, jsonFlag, serverURLFlag, verboseFlag},
	Action: func(c *cli.Context) error {
		name, err := oneSandbox(c)
		if err != nil {
			return err
		}
		var processes []rpc.ProcessInfo
		err = callServer(c, name, func(r *client.Client) (err error) {
			processes, err = r.Sandbox(c.String(namespaceFlag.Name), name).Processes(c.Context)
			return err
		})
		if err != nil {
			return withCallExitCode(err)
		}
		if c.Bool(jsonFlag.Name) {
			return printJSON(c, rpc.ProcessListResult{Processes: append([]rpc.ProcessInfo{}, processes...)})
		}
		if len(processes) == 0 {
			return printNone(c, "processes", "")
		}
		rows := [][]string{{"PID", "TAG", "STATE", "AGE", "USER", "COMMAND"}}
		for _, p := range processes {
			command := oneLine(strings.Join(append([]string{p.Command}, p.Args...), " "))
			rows = append(rows, []string{
				strconv.Itoa(p.PID), oneLine(p.Tag), processState(p), age(time.Since(p.StartedAt)), oneLine(p.User), command,
			})
		}
		return printTable(c.App.Writer, rows)
	},
}

// processState says how a process is, such as "running" or "exited 1".
func processState(p rpc.ProcessInfo) string {
	switch {
	case p.Exit == nil:
		return "running"
	case p.Exit.TimedOut:
		return "time limit"
	case p.Exit.Signal != "":
		return "SIG" + p.Exit.Signal
	}
	return fmt.Sprintf("exited %d", p.Exit.ExitCode)
}

var processLogs = &cli.Command{
	Name:      "logs",
	Usage:     "print what a process has printed",
	UsageText: "msb sandbox process logs [options] NAME [PROCESS]",
	Description: "The server remembers the last 1 MiB of each process.\n\n" +
		callExitCodes,
	Flags: []cli.Flag{followFlag, namespaceFlag, serverURLFlag, verboseFlag},
	Action: func(c *cli.Context) error {
		return onProcess(c, func(s *client.Sandbox, id client.ProcessID) error {
			if c.Bool(followFlag.Name) {
				return followLogs(c, s, id)
			}
			logs, err := s.ProcessLogs(c.Context, id)
			if err != nil {
				return err
			}
			noteSkipped(c, uint64(logs.SkippedBytes))
			stdout, stderr := forTerminal(c.App.Writer), forTerminal(c.App.ErrWriter)
			for _, l := range logs.Output {
				w := stdout
				if l.Stream == "stderr" {
					w = stderr
				}
				if _, err := w.Write(l.Base64); err != nil {
					return err
				}
			}
			return errors.Join(flush(stdout), flush(stderr))
		})
	},
}

func noteSkipped(c *cli.Context, bytes uint64) {
	if bytes > 0 {
		fmt.Fprintf(c.App.ErrWriter, "msb: the first %d bytes are no longer kept\n", bytes)
	}
}

// followLogs prints the output of a process until it ends. Ctrl-C ends msb, not the process.
func followLogs(c *cli.Context, s *client.Sandbox, id client.ProcessID) error {
	output := newQueue()
	p, err := s.AttachProcess(c.Context, id, true, client.Attachment{
		Stdout: output.to(forTerminal(c.App.Writer)), Stderr: output.to(forTerminal(c.App.ErrWriter)),
	})
	if err == nil {
		noteSkipped(c, p.SkippedBytes)
		_, err = p.Wait()
	}
	if finishErr := output.finish(c.Context); err == nil {
		err = finishErr
	}
	return err
}

var processKill = &cli.Command{
	Name:        "kill",
	Usage:       "send a signal to a process",
	UsageText:   "msb sandbox process kill [options] NAME [PROCESS]",
	Description: callExitCodes,
	Flags:       []cli.Flag{signalFlag, allFlag, namespaceFlag, serverURLFlag, verboseFlag},
	Action: func(c *cli.Context) error {
		return onProcess(c, func(s *client.Sandbox, id client.ProcessID) error {
			return s.SignalProcess(c.Context, id, c.String(signalFlag.Name), c.Bool(allFlag.Name))
		})
	},
}

// onProcess calls f with the process that the arguments name.
func onProcess(c *cli.Context, f func(*client.Sandbox, client.ProcessID) error) error {
	if n := c.NArg(); n != 1 && n != 2 {
		return usageError(c, "give the name of one sandbox, and the pid or the tag of a process")
	}
	if err := checkNotEmpty(c); err != nil {
		return err
	}
	name := c.Args().First()
	return withCallExitCode(callServer(c, name, func(r *client.Client) error {
		s := r.Sandbox(c.String(namespaceFlag.Name), name)
		id := client.ProcessID{Tag: c.Args().Get(1)}
		if pid, err := strconv.Atoi(id.Tag); err == nil && pid > 0 {
			id = client.ProcessID{PID: pid}
		}
		if c.NArg() == 1 {
			var err error
			if id, err = onlyProcess(c, s); err != nil {
				return err
			}
		}
		return f(s, id)
	}))
}

// onlyProcess returns the only process that runs. If none runs, it returns the only one that the server remembers.
func onlyProcess(c *cli.Context, s *client.Sandbox) (client.ProcessID, error) {
	all, err := s.Processes(c.Context)
	if err != nil {
		return client.ProcessID{}, err
	}
	var running []rpc.ProcessInfo
	for _, p := range all {
		if p.Running {
			running = append(running, p)
		}
	}
	if len(running) == 0 {
		running = all
	}
	switch len(running) {
	case 0:
		return client.ProcessID{}, fmt.Errorf("sandbox %s has no processes in the background", s.Name)
	case 1:
		return client.ProcessID{PID: running[0].PID}, nil
	}
	return client.ProcessID{}, cli.Exit(fmt.Sprintf("sandbox %s has %d processes: give the pid or the tag of one; 'msb process ls %[1]s' lists them",
		s.Name, len(running)), exitUsage)
}
