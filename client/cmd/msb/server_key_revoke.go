package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

var keyRevoke = &cli.Command{
	Name:      "revoke",
	Aliases:   []string{"delete", "rm"},
	Usage:     "revoke API keys, immediately and permanently",
	UsageText: "msb server key revoke [options] KEY...",
	Description: "The keys stop working before the command returns, and their running requests are canceled. If any KEY is\n" +
		"not found, none is revoked.\n\n" + keyRefHelp,
	Flags:  []cli.Flag{yesFlag},
	Action: revokeKeys,
}

func revokeKeys(c *cli.Context) error {
	if err := checkNotEmpty(c); err != nil {
		return err
	}
	if c.NArg() == 0 {
		return usageError(c, "give one or more KEYs; 'msb server key list' lists them")
	}
	a := admin(c)
	defer a.Close()
	var keys []*adminv1.Key
	var titles []string
	for _, ref := range c.Args().Slice() {
		key, err := a.Key(c.Context, ref)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(keys, func(k *adminv1.Key) bool { return k.GetId() == key.GetId() }) {
			continue
		}
		keys, titles = append(keys, key), append(titles, describeKeyID(key))
	}
	if err := confirm(c, "This permanently revokes "+strings.Join(titles, ", ")+"."); err != nil {
		return err
	}
	for _, key := range keys {
		// Revoke by id, because another key may have been given the name in the meantime.
		revoked, err := a.RevokeKey(c.Context, key.GetId())
		if err != nil {
			return fmt.Errorf("revoke %s: %w", describeKeyID(key), err)
		}
		if key.GetState() == adminv1.KeyState_KEY_STATE_REVOKED {
			fmt.Fprintf(c.App.ErrWriter, "%s was already revoked\n", describeKeyID(revoked))
			continue
		}
		fmt.Fprintf(c.App.ErrWriter, "%s was revoked\n", describeKeyID(revoked))
	}
	return nil
}
