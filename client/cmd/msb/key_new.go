package main

import (
	"context"
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
)

// keyVariable is the environment variable from which clients read their key.
const keyVariable = "MSB_API_KEY"

// newKeyFlags determine where a new key is written.
var newKeyFlags = []cli.Flag{
	&cli.StringFlag{Name: "env-file", Usage: "write the key to `FILE` as " + keyVariable + " and do not print it"},
	jsonFlag,
	&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "print only the key"},
}

const envFileHelp = "With --env-file, the key is not printed, not even with --json. It is written to the file: it replaces the\n" +
	"value in every line that sets MSB_API_KEY, or is added on a new line. The other lines and the file's owner do\n" +
	"not change; a file created by root gets the owner of its directory. The file's mode is set to 0600. Symbolic\n" +
	"links are not followed. If the file cannot be written, no key is created, or it is revoked."

// newKeyInfo is a key that was just created.
type newKeyInfo struct {
	secret string
	key    *adminv1.Key
	old    *adminv1.Key // the key that it replaces, or nil
}

// newKey calls create and prints or stores the new key as the flags say.
func newKey(c *cli.Context, create func(*client.Admin) (newKeyInfo, error)) error {
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
	created, err := create(a)
	if err != nil {
		return err
	}
	if file != nil {
		if err := file.set(keyVariable, created.secret); err != nil {
			return revokeLost(c, a, created, err)
		}
	}
	err = created.print(c)
	if err != nil && file == nil {
		return revokeLost(c, a, created, err)
	}
	return err
}

// revokeTimeout limits how long revokeLost waits for the server.
const revokeTimeout = 10 * time.Second

// revokeLost revokes a new key that could not be handed over because of err: nobody needs it, and a part of it may be in
// a file. It returns err with what was done.
func revokeLost(c *cli.Context, a *client.Admin, created newKeyInfo, err error) error {
	// Ctrl-C may be the reason why the key was not handed over.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.Context), revokeTimeout)
	defer cancel()
	key := describeKeyID(created.key)
	if _, revokeErr := a.RevokeKey(ctx, created.key.GetId()); revokeErr != nil {
		return fmt.Errorf("%s was created, but could not be written anywhere (%w), and it could not be revoked (%w): revoke it with "+
			"'msb server key revoke %s' and create another one", key, err, revokeErr, created.key.GetId())
	}
	replaced := ""
	if created.old != nil && !isLive(created.old) {
		replaced = fmt.Sprintf(" The key that it replaced, %s, is revoked as well.", created.old.GetId())
	}
	return fmt.Errorf("%s was created, but could not be written anywhere, so it was revoked: %w.%s Fix the cause and create another key", key, err, replaced)
}

func (k newKeyInfo) print(c *cli.Context) error {
	file := c.String("env-file")
	switch {
	case c.Bool(jsonFlag.Name):
		doc := struct {
			Key string `json:"key,omitempty"`
			keyInfo
			Replaces *keyInfo `json:"replaces,omitempty"`
		}{keyInfo: keyJSON(k.key)}
		if file == "" {
			doc.Key = k.secret
		}
		if k.old != nil {
			old := keyJSON(k.old)
			doc.Replaces = &old
		}
		return printJSON(c, doc)
	case file == "":
		if _, err := fmt.Fprintln(c.App.Writer, k.secret); err != nil {
			return fmt.Errorf("print the key: %w", err)
		}
	}
	if c.Bool("quiet") {
		return nil
	}
	expiry := "never expires"
	if at := k.key.GetExpiresAt(); at != nil {
		expiry = "expires " + localTime(at)
	}
	where := "It is not shown again; clients read it from " + keyVariable + "."
	if file != "" {
		where = "It was written to " + file + " as " + keyVariable + "."
	}
	fmt.Fprintf(c.App.ErrWriter, "%s is valid in %s, allows %s and %s. %s\n", describeKeyID(k.key), validIn(k.key), scopesText(k.key), expiry, printable(where))
	if k.old != nil {
		until := "is refused from now on"
		if isLive(k.old) {
			until = "is valid until " + localTime(acceptedUntil(k.old))
		}
		fmt.Fprintf(c.App.ErrWriter, "It replaces %s, which %s.\n", describeKeyID(k.old), until)
	}
	return nil
}
