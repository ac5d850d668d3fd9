package main

import (
	"slices"
	"time"

	"github.com/urfave/cli/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
)

var keyList = &cli.Command{
	Name:      "list",
	Aliases:   []string{"ls"},
	Usage:     "list API keys, oldest first",
	UsageText: "msb server key list [options]",
	Description: "Without --expired, --revoked or --all, only live keys are listed. '*' means all namespaces or all scopes.\n" +
		"A key that was rotated with a grace period is live until the time in the column STATE. --json prints everything\n" +
		"that the server knows about each key, with its complete id, creator and number of requests.",
	Flags: []cli.Flag{
		&cli.StringFlag{Name: "namespace", Aliases: []string{"n"}, Usage: "list only keys that are valid in namespace `NS`"},
		&cli.StringFlag{Name: "unused-for", Usage: "list only keys that were not used for `DURATION`, such as 90d; if a key was never used, its creation counts"},
		&cli.BoolFlag{Name: "expired", Usage: "list expired keys"},
		&cli.BoolFlag{Name: "revoked", Usage: "list keys that were revoked, rotated or invalidated by a reset"},
		&cli.BoolFlag{Name: "all", Aliases: []string{"a"}, Usage: "list keys in every state"},
		jsonFlag,
	},
	Action: listKeys,
}

func listKeys(c *cli.Context) error {
	if err := noArguments(c); err != nil {
		return err
	}
	states := chosenStates(c)
	req := &adminv1.ListKeysRequest{Namespace: c.String("namespace"), UnusedFor: c.String("unused-for")}
	if len(states) == 1 {
		req.State = states[0] // a request has one state or all; several are filtered below
	}
	a := admin(c)
	defer a.Close()
	var keys []*adminv1.Key
	for key, err := range a.Keys(c.Context, req) {
		if err != nil {
			return err
		}
		if len(states) == 1 || slices.Contains(states, key.GetState()) {
			keys = append(keys, key)
		}
	}
	if c.Bool(jsonFlag.Name) {
		return printJSON(c, keysJSON(keys))
	}
	if len(keys) == 0 {
		return printNoKeys(c, a)
	}
	return printKeys(c, keys, time.Now())
}

// printNoKeys says that no key matches the options, and how many keys in other states do.
func printNoKeys(c *cli.Context, a *client.Admin) error {
	others := 0
	for _, err := range a.Keys(c.Context, &adminv1.ListKeysRequest{Namespace: c.String("namespace"), UnusedFor: c.String("unused-for")}) {
		if err != nil {
			return err
		}
		others++
	}
	what := "such API keys"
	switch filtered := c.IsSet("namespace") || c.IsSet("unused-for"); {
	case others > 0:
		if !filtered && !c.Bool("expired") && !c.Bool("revoked") {
			what = "live API keys"
		}
		what += "; --all shows " + plural(others, "other", "others")
	case !filtered:
		what = "API keys; create one with 'msb server keygen'"
	}
	return printNone(c, what, "")
}

func chosenStates(c *cli.Context) (states []adminv1.KeyState) {
	const live, expired, revoked = adminv1.KeyState_KEY_STATE_LIVE, adminv1.KeyState_KEY_STATE_EXPIRED, adminv1.KeyState_KEY_STATE_REVOKED
	if c.Bool("all") {
		return []adminv1.KeyState{live, expired, revoked}
	}
	if c.Bool("expired") {
		states = append(states, expired)
	}
	if c.Bool("revoked") {
		states = append(states, revoked)
	}
	if len(states) == 0 {
		states = append(states, live)
	}
	return states
}

// ago formats the time since t, such as "5m10s ago". A nil t is "never".
func ago(t *timestamppb.Timestamp, now time.Time) string {
	if t == nil {
		return "never"
	}
	return age(now.Sub(t.AsTime())) + " ago"
}

// expiresIn formats the time until a live key is refused, because it expires or was rotated. For other keys it returns "".
func expiresIn(k *adminv1.Key, now time.Time) string {
	if !isLive(k) {
		return ""
	}
	until := acceptedUntil(k)
	if until == nil {
		return "never"
	}
	return age(until.AsTime().Sub(now))
}
