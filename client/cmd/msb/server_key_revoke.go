package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
)

var keyRevoke = &cli.Command{
	Name:      "revoke",
	Aliases:   []string{"delete", "rm"},
	Usage:     "revoke API keys, immediately and permanently",
	UsageText: "msb server key revoke [options] KEY...",
	Description: "The keys stop working before the command returns, and their running requests are canceled. If any KEY is\n" +
		"not found, none is revoked.\n\n" +
		"The name of a key means every live key with this name, also one that was rotated and is in its grace period. To\n" +
		"revoke only one of them, give its id.\n\n" + keyRefHelp,
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
		found, err := keysToRevoke(c.Context, a, ref)
		if err != nil {
			return err
		}
		for _, key := range found {
			if slices.ContainsFunc(keys, func(k *adminv1.Key) bool { return k.GetId() == key.GetId() }) {
				continue
			}
			keys, titles = append(keys, key), append(titles, describeToRevoke(key))
		}
	}
	if err := confirm(c, "This permanently revokes "+strings.Join(titles, ", ")+"."); err != nil {
		return err
	}
	for _, key := range keys {
		// Revoke by id, because another key may have been given the name in the meantime.
		if _, err := a.RevokeKey(c.Context, key.GetId()); err != nil {
			return fmt.Errorf("revoke %s: %w", describeKeyID(key), err)
		}
		if key.GetState() == adminv1.KeyState_KEY_STATE_REVOKED {
			fmt.Fprintf(c.App.ErrWriter, "%s was already revoked\n", describeKeyID(key))
			continue
		}
		fmt.Fprintf(c.App.ErrWriter, "%s was revoked\n", describeToRevoke(key))
	}
	return reportStillValid(c, a, keys)
}

// keysToRevoke returns the keys that ref means: one key, or every live key whose name it is.
func keysToRevoke(ctx context.Context, a *client.Admin, ref string) (keys []*adminv1.Key, err error) {
	otherID := false // whether ref is also the prefix of the id of a key with another name
	for key, err := range a.Keys(ctx, &adminv1.ListKeysRequest{State: adminv1.KeyState_KEY_STATE_LIVE}) {
		if err != nil {
			return nil, err
		}
		if key.GetName() == ref {
			keys = append(keys, key)
		} else if len(ref) >= minIDPrefix && strings.HasPrefix(key.GetId(), ref) {
			otherID = true
		}
	}
	if len(keys) > 0 && !otherID {
		return keys, nil
	}
	key, err := a.Key(ctx, ref) // also decides whether ref is ambiguous
	if err != nil {
		return nil, err
	}
	return []*adminv1.Key{key}, nil
}

// reportStillValid names the keys that the revoked ones replaced and that are still valid: those that were rotated with a
// grace period if their replacement was revoked by its id.
func reportStillValid(c *cli.Context, a *client.Admin, revoked []*adminv1.Key) error {
	for key, err := range a.Keys(c.Context, &adminv1.ListKeysRequest{State: adminv1.KeyState_KEY_STATE_LIVE}) {
		if err != nil {
			return fmt.Errorf("the keys were revoked, but msb could not find out whether keys that they replaced are still valid: %w", err)
		}
		replaced := slices.ContainsFunc(revoked, func(k *adminv1.Key) bool {
			sameName := k.GetName() != "" && k.GetName() == key.GetName() && key.GetReplacedBy() != ""
			return key.GetId() != k.GetId() && (sameName || key.GetReplacedBy() == k.GetId())
		})
		if !replaced {
			continue
		}
		fmt.Fprintf(c.App.ErrWriter, "%s, which was rotated, is still valid until %s. To revoke it as well: msb server key revoke %s\n",
			describeKeyID(key), localTime(acceptedUntil(key)), key.GetId())
	}
	return nil
}

// describeToRevoke describes the key and, if it was rotated and is in its grace period, says so.
func describeToRevoke(k *adminv1.Key) string {
	if isLive(k) && k.GetReplacedBy() != "" {
		return describeKeyID(k) + " (rotated, but still valid)"
	}
	return describeKeyID(k)
}
