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
	Usage:     "refuse API keys, at once and for good",
	UsageText: "msb server key revoke KEY... [--yes]",
	Description: "The keys are refused from before the command returns, and what they have in progress is cut. Unless all of\n" +
		"them are found, none is revoked.\n\n" + keyRefHelp,
	Flags:  []cli.Flag{yesFlag},
	Action: revokeKeys,
}

func revokeKeys(c *cli.Context) error {
	if err := noneEmpty(c); err != nil {
		return err
	}
	if c.NArg() == 0 {
		return usage(c, "name a KEY, or several; 'msb server key list' shows them")
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
		keys, titles = append(keys, key), append(titles, title(key))
	}
	if err := confirm(c, "This refuses "+strings.Join(titles, ", ")+", for good."); err != nil {
		return err
	}
	for _, key := range keys {
		// By id: the name may have come to another key meanwhile.
		revoked, err := a.RevokeKey(c.Context, key.GetId())
		if err != nil {
			return fmt.Errorf("revoke %s: %w", title(key), err)
		}
		if key.GetState() == adminv1.KeyState_KEY_STATE_REVOKED {
			fmt.Fprintf(c.App.ErrWriter, "%s was revoked before\n", title(revoked))
			continue
		}
		fmt.Fprintf(c.App.ErrWriter, "%s is refused from now on\n", title(revoked))
	}
	return nil
}
