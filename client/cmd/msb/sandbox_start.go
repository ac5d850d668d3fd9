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

var imageFlag = &cli.StringFlag{Name: "image", Usage: "`IMAGE` to start from, such as microsandbox/python or microsandbox/node (default: set by the server, usually microsandbox/python)"}

// startFlags are the flags of commands that start a sandbox.
var startFlags = []cli.Flag{
	imageFlag,
	&cli.IntFlag{Name: "cpus", Usage: "number `N` of virtual CPUs, at most the server's maximum", DefaultText: "set by the server, usually 1"},
	&cli.GenericFlag{
		Name: "memory", Aliases: []string{"m"}, Value: &sandboxSize{least: minMemory},
		Usage: "memory `SIZE`: a number of MiB, or with a unit, such as 512m or 1g; from 128 MiB to the server's maximum (default: set by the server, usually 512 MiB)",
	},
	&cli.GenericFlag{
		Name: "disk", Value: &sandboxSize{least: minDisk},
		Usage: "size of the writable disk, `SIZE`: as for --memory; from 64 MiB to the server's maximum (default: set by the server, usually 4 GiB)",
	},
	&cli.GenericFlag{
		Name: "env", Aliases: []string{"e"}, Value: new(assignments),
		Usage: "environment variable `NAME=VALUE` for everything that runs in the sandbox; NAME alone takes the value from msb's environment, " +
			"which other users cannot see; repeatable",
	},
	&cli.StringFlag{Name: "workdir", Aliases: []string{"w"}, Usage: "working directory `DIR` of runs, an absolute path; created if it does not exist"},
	&cli.StringFlag{
		Name: "user", Aliases: []string{"u"},
		Usage: "run everything as `USER`, a name or a number, optionally with : and a group, unless the command says otherwise (default: set by the image)",
	},
	&cli.StringFlag{Name: "hostname", Usage: "hostname `NAME` of the sandbox: letters, digits and hyphens", DefaultText: "sandbox"},
	namespaceFlag, serverURLFlag, verboseFlag,
}

var sandboxStart = &cli.Command{
	Name:      "start",
	Usage:     "start a sandbox and wait until it is ready",
	UsageText: "msb sandbox start [options] NAME",
	Description: "If the sandbox is already running with the same options, nothing is done.\n\n" +
		callExitCodes,
	Flags:  startFlags,
	Action: startSandbox,
}

func startSandbox(c *cli.Context) error {
	name, err := oneSandbox(c)
	if err != nil {
		return err
	}
	config := startConfig(c)
	began, running := time.Now(), false
	err = callServer(c, name, func(r *client.Client) error {
		s := r.Sandbox(c.String(namespaceFlag.Name), name)
		// The response to a start does not contain the earlier state. A key without the scope sandbox:read cannot get it.
		info, err := s.Get(c.Context)
		if _, answered := errors.AsType[*client.Error](err); err != nil && !answered {
			return err
		}
		running = err == nil && info.State == rpc.StateRunning
		return s.Start(c.Context, config)
	})
	switch {
	case err == nil && running:
		fmt.Fprintf(c.App.ErrWriter, "sandbox %s was already running\n", name)
	case err == nil:
		fmt.Fprintf(c.App.ErrWriter, "sandbox %s is ready (%s)\n", name, time.Since(began).Round(100*time.Millisecond))
	}
	return withCallExitCode(err)
}

// startConfig returns the configuration that the startFlags ask for.
func startConfig(c *cli.Context) *rpc.SandboxConfig {
	config := &rpc.SandboxConfig{
		Image: c.String("image"), Memory: c.Generic("memory").(*sandboxSize).mib, Disk: c.Generic("disk").(*sandboxSize).mib,
		Envs: *c.Generic("env").(*assignments), Workdir: c.String("workdir"), User: c.String("user"), Hostname: c.String("hostname"),
	}
	if c.IsSet("cpus") {
		config.CPUs = new(c.Int("cpus"))
	}
	return config
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
