package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/client"
)

var sandboxStart = &cli.Command{
	Name:      "start",
	Usage:     "start a sandbox and wait until it is ready",
	UsageText: "msb sandbox start [options] NAME",
	Description: "If the sandbox is already running with the same options, nothing is done.\n\n" +
		callExitCodes,
	Flags: []cli.Flag{
		&cli.StringFlag{Name: "image", Usage: "`IMAGE` to start from, such as microsandbox/python or microsandbox/node (default: set by the server)"},
		&cli.IntFlag{Name: "cpus", Usage: "number `N` of virtual CPUs", DefaultText: "set by the server"},
		&cli.IntFlag{Name: "memory", Usage: "memory size in `MIB`", DefaultText: "set by the server"},
		&cli.GenericFlag{
			Name: "env", Aliases: []string{"e"}, Value: new(assignments),
			Usage: "environment variable `NAME=VALUE` for everything that runs in the sandbox; NAME alone takes the value from msb's environment, " +
				"which other users cannot see; repeatable",
		},
		&cli.StringFlag{Name: "workdir", Aliases: []string{"w"}, Usage: "working directory `DIR` of runs, an absolute path"},
		namespaceFlag, serverURLFlag, verboseFlag,
	},
	Action: startSandbox,
}

func startSandbox(c *cli.Context) error {
	name, err := oneSandbox(c)
	if err != nil {
		return err
	}
	config := &rpc.SandboxConfig{
		Image: c.String("image"), Memory: c.Int("memory"), Envs: *c.Generic("env").(*assignments), Workdir: c.String("workdir"),
	}
	if c.IsSet("cpus") {
		config.CPUs = new(c.Int("cpus"))
	}
	began := time.Now()
	err = callServer(c, name, func(r *client.Client) error {
		return r.Sandbox(c.String(namespaceFlag.Name), name).Start(c.Context, config)
	})
	if err == nil {
		fmt.Fprintf(c.App.ErrWriter, "sandbox %s is ready (%s)\n", name, time.Since(began).Round(100*time.Millisecond))
	}
	return withCallExitCode(err)
}

// assignments is the values of a repeatable flag NAME=VALUE. Unlike with urfave/cli's StringSlice, a value may contain
// commas.
type assignments []string

func (a *assignments) Set(text string) error {
	name, _, assigned := strings.Cut(text, "=")
	if name == "" {
		return errors.New("the name is missing")
	}
	if !assigned {
		value, set := os.LookupEnv(name)
		if !set {
			return errors.New("there is no such variable in msb's environment")
		}
		text = name + "=" + value
	}
	*a = append(*a, text)
	return nil
}

func (a *assignments) String() string { return "" }
