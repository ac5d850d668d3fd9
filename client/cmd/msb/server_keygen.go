package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
)

var (
	expireFlag = &cli.StringFlag{
		Name: "expire",
		Usage: "the key's life, `DURATION`: a number and s, m (minutes), h, d, w, mo (months) or y, or several of " +
			"them, as in 1w2d (default: never expires)",
	}
	scopeFlag = &cli.StringSliceFlag{
		Name:  "scope",
		Usage: "let the key do only what `SCOPE` allows; repeatable (default: everything)",
	}
)

// scopes are those that this version knows of; the server decides.
var scopes = [][2]string{
	{"sandbox:start", "start sandboxes"},
	{"sandbox:stop", "stop sandboxes"},
	{"sandbox:exec", "run code and commands in sandboxes"},
	{"sandbox:read", "read sandboxes' metrics"},
	{"server:metrics", "read the metrics of the whole server"},
}

func scopeHelp() string {
	list := "Scopes:"
	for _, scope := range scopes {
		list += fmt.Sprintf("\n  %-15s %s", scope[0], scope[1])
	}
	return list
}

var serverKeygen = &cli.Command{
	Name:  "keygen",
	Usage: "make an API key",
	UsageText: "msb server keygen [--expire DURATION] [--namespace NS]... [--scope SCOPE]... [--name NAME]\n\n" +
		"export MSB_API_KEY=$(msb server keygen --expire 3mo)\n" +
		"msb server keygen --namespace team-alpha --scope sandbox:exec --env-file .env",
	Description: "The key is printed on standard output, and what it is on standard error. It is shown this once:\n" +
		"the server keeps only a record of it. Keys made before stay valid.\n\n" + scopeHelp() + "\n\n" + envFileHelp,
	Flags: append([]cli.Flag{
		expireFlag,
		&cli.StringSliceFlag{
			Name: "namespace", Aliases: []string{"n"}, Usage: "limit the key to tenant namespace `NS`; repeatable (default: every one)",
		},
		scopeFlag,
		&cli.StringFlag{
			Name: "name", Usage: "call the key `NAME`, 1 to 63 of A-Z a-z 0-9 _ . -; no other live key may have it (default: none)",
		},
		secretFlag(),
	}, newKeyFlags...),
	Action: keygen,
}

// secretFlag takes --key, so that it can be refused with the reason.
func secretFlag() cli.Flag { return &cli.StringFlag{Name: "key", Hidden: true} }

func refuseSecret(c *cli.Context) error {
	if !c.IsSet("key") {
		return nil
	}
	return cli.Exit("--key is refused: every user of this host can read a program's arguments, and this one was a secret. "+
		"msbd makes its signing key itself and keeps it in a file of its own: leave --key out. If the one you gave is in use "+
		"anywhere, replace it", exitUsage)
}

func keygen(c *cli.Context) error {
	if err := refuseSecret(c); err != nil {
		return err
	}
	if err := noArguments(c); err != nil {
		return err
	}
	return newKey(c, func(a *client.Admin) (made newKeyInfo, err error) {
		resp, err := a.CreateKey(c.Context, &adminv1.CreateKeyRequest{
			Name:       c.String("name"),
			Expire:     c.String("expire"),
			Namespaces: c.StringSlice("namespace"),
			Scopes:     c.StringSlice("scope"),
		})
		if err != nil {
			return made, err
		}
		return newKeyInfo{secret: resp.GetKey(), key: resp.GetInfo()}, nil
	})
}
