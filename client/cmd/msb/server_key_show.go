package main

import (
	"cmp"
	"fmt"
	"strconv"
	"time"

	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

var keyShow = &cli.Command{
	Name:        "show",
	Usage:       "show the details of an API key",
	UsageText:   "msb server key show [options] KEY",
	Description: keyRefHelp,
	Flags:       []cli.Flag{jsonFlag},
	Action:      showKey,
}

// oneKey returns the KEY argument, which must be the only argument.
func oneKey(c *cli.Context) (string, error) {
	if err := checkNotEmpty(c); err != nil {
		return "", err
	}
	if c.NArg() != 1 {
		return "", usageError(c, "give one KEY; 'msb server key list' lists them")
	}
	return c.Args().First(), nil
}

func showKey(c *cli.Context) error {
	ref, err := oneKey(c)
	if err != nil {
		return err
	}
	a := admin(c)
	defer a.Close()
	key, err := a.Key(c.Context, ref)
	if err != nil {
		return err
	}
	if c.Bool(jsonFlag.Name) {
		return printJSON(c, keyJSON(key))
	}
	return printColored(c.App.Writer, describeKey(key, time.Now()), func(row int) color {
		if row != stateRow || isLive(key) {
			return plain
		}
		return red
	})
}

// stateRow is the index of the state in the rows of describeKey.
const stateRow = 2

// describeKey returns the rows of a table with the details of a key.
func describeKey(k *adminv1.Key, now time.Time) [][]string {
	state := stateText(k, localTime)
	if k.GetState() == adminv1.KeyState_KEY_STATE_REVOKED {
		state += " " + localTime(k.GetRevokedAt())
	}
	creator := cmp.Or(userName(k.GetCreatedBy()), "an unknown user")
	expires := "never"
	if at := k.GetExpiresAt(); at != nil {
		expires = localTime(at)
		if isLive(k) && k.GetRevokedAt() == nil {
			expires += ", in " + age(at.AsTime().Sub(now))
		}
	}
	used := "never"
	if at := k.GetLastUsedAt(); at != nil {
		used = fmt.Sprintf("%s, %s, from %s", localTime(at), ago(at, now), k.GetLastUsedFrom())
	}
	rows := [][]string{
		{"id", k.GetId()},
		{"name", cmp.Or(k.GetName(), "none")},
		{"state", state},
		{"valid in", validIn(k)},
		{"allows", scopesText(k)},
		{"created", fmt.Sprintf("%s, %s, by %s (uid %d)", localTime(k.GetCreatedAt()), ago(k.GetCreatedAt(), now), creator, k.GetCreatedBy())},
		{"expires", expires},
		{"last used", used},
		{"requests", strconv.FormatUint(k.GetRequests(), 10)},
		{"signing key", k.GetSigningKeyId()},
	}
	if k.GetReplacedBy() != "" {
		rows = append(rows, []string{"replaced by", k.GetReplacedBy()})
	}
	return rows
}
