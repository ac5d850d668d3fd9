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
	UsageText: "msb sandbox start NAME [--image IMAGE] [--cpus N] [--memory MIB] [--env NAME=VALUE]... [--workdir DIR]",
	Description: "Starting a sandbox that runs already, with the same options, does nothing.\n\n" +
		callExitCodes,
	Flags: []cli.Flag{
		&cli.StringFlag{Name: "image", Usage: "`IMAGE` to start from, such as microsandbox/python or microsandbox/node (default: the server's)"},
		&cli.IntFlag{Name: "cpus", Usage: "`N` virtual processors", DefaultText: "the server's"},
		&cli.IntFlag{Name: "memory", Usage: "`MIB` of memory", DefaultText: "the server's"},
		&cli.GenericFlag{
			Name: "env", Aliases: []string{"e"}, Value: new(assignments),
			Usage: "set `NAME=VALUE` for all that runs in it; NAME alone takes the value of msb's own environment, where other users do not see it; repeatable",
		},
		&cli.StringFlag{Name: "workdir", Aliases: []string{"w"}, Usage: "absolute `DIR` in which runs begin"},
		withinFlag, serverURLFlag, verboseFlag,
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
	err = remotely(c, name, func(r *client.Client) error {
		return r.Sandbox(c.String(withinFlag.Name), name).Start(c.Context, config)
	})
	if err == nil {
		fmt.Fprintf(c.App.ErrWriter, "sandbox %s is ready (%s)\n", name, time.Since(began).Round(100*time.Millisecond))
	}
	return exitOfCall(err)
}

// assignments are the values of a repeatable flag. They may hold commas, at which urfave/cli's own type
// would split them.
type assignments []string

func (a *assignments) Set(text string) error {
	name, _, assigned := strings.Cut(text, "=")
	if name == "" {
		return errors.New("it has no name")
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
