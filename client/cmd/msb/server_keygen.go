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
		Usage: "let the key expire after `DURATION`: a number with the unit s, m (minutes), h, d, w, mo (months) or y, such as 1.5h, or " +
			"several of them, such as 1w2d (default: never)",
	}
	scopeFlag = &cli.StringSliceFlag{
		Name:  "scope",
		Usage: "limit the key to `SCOPE`; repeatable (default: everything)",
	}
)

// scopes lists the scopes for the help and for completion. The server checks which scopes exist.
var scopes = [][2]string{
	{"sandbox:start", "start sandboxes"},
	{"sandbox:stop", "stop sandboxes"},
	{"sandbox:exec", "run code and commands in sandboxes"},
	{"sandbox:files", "read and write the files of sandboxes"},
	{"sandbox:read", "list sandboxes and their processes, and read metrics and logs"},
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
	Usage: "create an API key",
	UsageText: "msb server keygen [options]\n\n" +
		"export MSB_API_KEY=$(msb server keygen --expire 3mo)\n" +
		"msb server keygen --namespace team-alpha --scope sandbox:exec --env-file .env",
	Description: "The key is printed on standard output, and its details on standard error. The key is shown only\n" +
		"once: the server stores a record of the key, not the key itself. Existing keys stay valid.\n\n" + scopeHelp() + "\n\n" + envFileHelp,
	Flags: append([]cli.Flag{
		expireFlag,
		&cli.StringSliceFlag{
			Name: "namespace", Aliases: []string{"n"}, Usage: "limit the key to namespace `NS`; repeatable (default: all)",
		},
		scopeFlag,
		&cli.StringFlag{
			Name: "name", Usage: "`NAME` of the key: 1 to 63 characters of A-Z a-z 0-9 - _ . that begin with a letter or digit, not used by another live key (default: none)",
		},
		secretFlag(),
	}, newKeyFlags...),
	Action: keygen,
}

// secretFlag returns a hidden flag --key. It exists so that refuseSecret can explain why it is not supported.
func secretFlag() cli.Flag { return &cli.StringFlag{Name: "key", Hidden: true} }

func refuseSecret(c *cli.Context) error {
	if !c.IsSet("key") {
		return nil
	}
	return cli.Exit("--key is not supported, because every user of this host can read a program's arguments. Omit it: "+
		"msbd creates its signing key itself and keeps it in a separate file. If the key you gave is in use anywhere, replace it", exitUsage)
}

func keygen(c *cli.Context) error {
	if err := refuseSecret(c); err != nil {
		return err
	}
	if err := noArguments(c); err != nil {
		return err
	}
	return newKey(c, func(a *client.Admin) (newKeyInfo, error) {
		resp, err := a.CreateKey(c.Context, &adminv1.CreateKeyRequest{
			Name:       c.String("name"),
			Expire:     c.String("expire"),
			Namespaces: c.StringSlice("namespace"),
			Scopes:     c.StringSlice("scope"),
		})
		if err != nil {
			return newKeyInfo{}, err
		}
		return newKeyInfo{secret: resp.GetKey(), key: resp.GetInfo()}, nil
	})
}
