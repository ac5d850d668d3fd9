package main

import (
	"fmt"

	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
)

// keyVariable is where clients look for their key.
const keyVariable = "MSB_API_KEY"

// newKeyFlags say where a new key goes.
var newKeyFlags = []cli.Flag{
	&cli.StringFlag{Name: "env-file", Usage: "put the key into `FILE` as " + keyVariable + ", and nowhere else"},
	jsonFlag,
	&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "print the key, and nothing else"},
}

const envFileHelp = "With --env-file, the key is not printed, neither as JSON: it goes into the file, in place of the value in\n" +
	"every line that sets MSB_API_KEY, or in a line of its own. The other lines and the file's owner stay; a new\n" +
	"file that root makes is its directory's owner's. Its mode becomes 0600. A symbolic link is not followed. A\n" +
	"file that cannot be written makes no key."

// newKeyInfo is a key that was just made.
type newKeyInfo struct {
	secret string
	key    *adminv1.Key
	old    *adminv1.Key // that it replaces, if it does
}

// newKey makes a key and hands it over as the command line asks.
func newKey(c *cli.Context, make func(*client.Admin) (newKeyInfo, error)) error {
	var file *envFile
	if path := c.String("env-file"); path != "" {
		var err error
		if file, err = prepareEnvFile(path); err != nil {
			return err
		}
		defer file.discard()
	}
	a := admin(c)
	defer a.Close()
	made, err := make(a)
	if err != nil {
		return err
	}
	lost := func(err error) error {
		return fmt.Errorf("%s was made, but nobody has it (refuse it with 'msb server key revoke %s', and make another): %w",
			title(made.key), made.key.GetId(), err)
	}
	if file != nil {
		if err := file.set(keyVariable, made.secret); err != nil {
			return lost(err)
		}
	}
	err = made.print(c)
	if err != nil && file == nil {
		return lost(err)
	}
	return err
}

func (made newKeyInfo) print(c *cli.Context) error {
	file := c.String("env-file")
	switch {
	case c.Bool(jsonFlag.Name):
		doc := struct {
			Key string `json:"key,omitempty"`
			keyInfo
			Replaces *keyInfo `json:"replaces,omitempty"`
		}{keyInfo: keyJSON(made.key)}
		if file == "" {
			doc.Key = made.secret
		}
		if made.old != nil {
			old := keyJSON(made.old)
			doc.Replaces = &old
		}
		return printJSON(c, doc)
	case file == "":
		if _, err := fmt.Fprintln(c.App.Writer, made.secret); err != nil {
			return fmt.Errorf("print the key: %w", err)
		}
	}
	if c.Bool("quiet") {
		return nil
	}
	end := "never expires"
	if at := made.key.GetExpiresAt(); at != nil {
		end = "expires " + localTime(at)
	}
	where := "It is not shown again; clients take it from " + keyVariable + "."
	if file != "" {
		where = "It is in " + file + " as " + keyVariable + "."
	}
	fmt.Fprintf(c.App.ErrWriter, "%s for %s, may do %s, %s. %s\n", title(made.key), reach(made.key), may(made.key), end, printable(where))
	if made.old != nil {
		fmt.Fprintf(c.App.ErrWriter, "%s, which it replaces, is refused from %s on.\n", title(made.old), refusedFrom(made.old))
	}
	return nil
}

func refusedFrom(k *adminv1.Key) string {
	if !isLive(k) {
		return "now"
	}
	return localTime(k.GetRevokedAt())
}
