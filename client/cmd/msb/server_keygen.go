package main

import (
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

var serverKeygen = &cli.Command{
	Name:  "keygen",
	Usage: "make an API key",
	UsageText: "msb server keygen [--expire DURATION] [--namespace NS]\n\n" +
		"export MSB_API_KEY=$(msb server keygen --expire 3mo)",
	Description: "The key is printed on standard output, and what it is on standard error. It is shown this once:\n" +
		"the server keeps only a record of it. Keys made before stay valid.",
	Flags: []cli.Flag{
		&cli.StringFlag{
			Name: "expire",
			Usage: "the key's life, `DURATION`: a number and s, m (minutes), h, d, w, mo (months) or y, or several of " +
				"them, as in 1w2d (default: never expires)",
		},
		&cli.StringFlag{Name: "namespace", Aliases: []string{"n"}, Usage: "limit the key to tenant namespace `NS` (default: every one)"},
		jsonFlag,
		secretFlag(),
	},
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

type keyInfo struct {
	Key       string     `json:"key"`
	ID        string     `json:"id"`
	Namespace string     `json:"namespace"`
	CreatedAt *time.Time `json:"created_at"`
	ExpiresAt *time.Time `json:"expires_at"`
}

func keygen(c *cli.Context) error {
	if err := refuseSecret(c); err != nil {
		return err
	}
	if err := noArguments(c); err != nil {
		return err
	}
	// An empty value is more likely an unset shell variable than a wish for a key without limits.
	for _, name := range []string{"expire", "namespace"} {
		if c.IsSet(name) && c.String(name) == "" {
			return usage(c, "--%s is empty; leave it out if it is not wanted", name)
		}
	}
	a := admin(c)
	defer a.Close()
	resp, err := a.CreateKey(c.Context, &adminv1.CreateKeyRequest{Expire: c.String("expire"), Namespace: c.String("namespace")})
	if err != nil {
		return err
	}
	info := resp.GetInfo()
	if c.Bool(jsonFlag.Name) {
		return printJSON(c, keyInfo{
			resp.GetKey(), info.GetId(), info.GetNamespace(), jsonTime(info.GetCreatedAt()), jsonTime(info.GetExpiresAt()),
		})
	}
	if _, err := fmt.Fprintln(c.App.Writer, resp.GetKey()); err != nil {
		return fmt.Errorf("print the key: %w", err)
	}
	reach := "every namespace"
	if ns := info.GetNamespace(); ns != "" {
		reach = "namespace " + ns
	}
	end := "never expires"
	if at := info.GetExpiresAt(); at != nil {
		end = "expires " + at.AsTime().Local().Format("2006-01-02 15:04:05 MST")
	}
	fmt.Fprintf(c.App.ErrWriter, "API key %s for %s, %s. It is not shown again; clients take it from MSB_API_KEY.\n",
		info.GetId(), reach, end)
	return nil
}
