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
	Usage:       "say all that is known of an API key",
	UsageText:   "msb server key show KEY [--json]",
	Description: keyRefHelp,
	Flags:       []cli.Flag{jsonFlag},
	Action:      showKey,
}

// oneKey is the only argument of a command.
func oneKey(c *cli.Context) (string, error) {
	if err := noneEmpty(c); err != nil {
		return "", err
	}
	if c.NArg() != 1 {
		return "", usage(c, "name one KEY; 'msb server key list' shows them")
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
	return paintedTable(c.App.Writer, describeKey(key, time.Now()), func(row int) colour {
		if row != stateRow || isLive(key) {
			return plain
		}
		return red
	})
}

// stateRow is which row of describeKey says the state.
const stateRow = 2

func describeKey(k *adminv1.Key, now time.Time) [][]string {
	state := keyState(k)
	if revocation := k.GetRevocation(); revocation != "" {
		state += fmt.Sprintf(", %s %s", revocation, localTime(k.GetRevokedAt()))
	}
	creator := cmp.Or(userName(k.GetCreatedBy()), "a user without a name")
	expires := "never"
	if at := k.GetExpiresAt(); at != nil {
		expires = localTime(at)
		if left := at.AsTime().Sub(now); left > 0 {
			expires += ", in " + age(left)
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
		{"good in", reach(k)},
		{"may do", may(k)},
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
