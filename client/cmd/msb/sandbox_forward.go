package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/urfave/cli/v2"
	"golang.org/x/sync/errgroup"

	"github.com/msbd/msbd/client"
)

var sandboxForward = &cli.Command{
	Name:  "forward",
	Usage: "forward ports of this machine to ports of a sandbox",
	UsageText: "msb sandbox forward [options] NAME PORT[:SANDBOX-PORT]...\n\n" +
		"msb sandbox forward my-env 8080\n" +
		"msb sandbox forward my-env 8080:80 0:5432",
	Description: "Connections to PORT on this machine go to SANDBOX-PORT, or to the same port, on the loopback interface of the\n" +
		"sandbox. PORT 0 means any free port; the port that was chosen is printed. Ctrl-C ends the command.\n\n" +
		callExitCodes,
	Flags: []cli.Flag{
		&cli.StringFlag{Name: "address", Value: "127.0.0.1", Usage: "listen on this `ADDRESS` of this machine; everyone who reaches it can use the ports"},
		namespaceFlag, serverURLFlag, verboseFlag,
	},
	Action: forwardPorts,
}

// portPair is a port of this machine and one of a sandbox.
type portPair struct{ local, remote int }

// parsePorts parses PORT[:SANDBOX-PORT].
func parsePorts(text string) (p portPair, err error) {
	local, remote, pair := strings.Cut(text, ":")
	if !pair {
		remote = local
	}
	if p.local, err = strconv.Atoi(local); err == nil {
		p.remote, err = strconv.Atoi(remote)
	}
	if err != nil || p.local < 0 || p.local > 65535 || p.remote < 1 || p.remote > 65535 {
		return p, fmt.Errorf("%q: give PORT or PORT:SANDBOX-PORT, with numbers up to 65535", text)
	}
	return p, nil
}

func forwardPorts(c *cli.Context) error {
	if c.NArg() < 2 {
		return usageError(c, "give the name of one sandbox and at least one port")
	}
	if err := checkNotEmpty(c); err != nil {
		return err
	}
	name := c.Args().First()
	var pairs []portPair
	for _, text := range c.Args().Slice()[1:] {
		p, err := parsePorts(text)
		if err != nil {
			return usageError(c, "%v", err)
		}
		pairs = append(pairs, p)
	}
	err := callServer(c, name, func(r *client.Client) error {
		s := r.Sandbox(c.String(namespaceFlag.Name), name)
		// A key may forward ports without the scope to get the sandbox.
		if _, err := s.Get(c.Context); err != nil && !errdefs.IsPermissionDenied(err) {
			return err
		}
		return forwardAll(c, s, pairs)
	})
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return withCallExitCode(err)
}

// forwardAll forwards ports until the user interrupts msb.
func forwardAll(c *cli.Context, s *client.Sandbox, pairs []portPair) error {
	g, ctx := errgroup.WithContext(c.Context)
	var listeners []net.Listener
	for _, p := range pairs {
		l, err := net.Listen("tcp", net.JoinHostPort(c.String("address"), strconv.Itoa(p.local)))
		if err != nil {
			for _, l := range listeners {
				l.Close()
			}
			return err
		}
		listeners = append(listeners, l)
	}
	for i, l := range listeners {
		fmt.Fprintf(c.App.ErrWriter, "forwarding %s to port %d of %s\n", l.Addr(), pairs[i].remote, s.Name)
		g.Go(func() error {
			return s.Forward(ctx, l, pairs[i].remote, func(err error) {
				fmt.Fprintf(c.App.ErrWriter, "msb: port %d: %s\n", pairs[i].remote, printable(err.Error()))
			})
		})
	}
	return g.Wait()
}
