package main

import (
	"slices"
	"time"

	"github.com/urfave/cli/v2"
	"google.golang.org/protobuf/types/known/timestamppb"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

var keyList = &cli.Command{
	Name:      "list",
	Usage:     "list API keys, the oldest first",
	UsageText: "msb server key list [--namespace NS] [--unused-for DURATION] [--expired] [--revoked] [--all] [--json]",
	Description: "Without --expired, --revoked or --all, only live keys are listed. '*' stands for every namespace, or every\n" +
		"scope. --json has all that is known of each key: whole id, creator, requests.",
	Flags: []cli.Flag{
		&cli.StringFlag{Name: "namespace", Aliases: []string{"n"}, Usage: "only keys that are good in tenant namespace `NS`"},
		&cli.StringFlag{Name: "unused-for", Usage: "only keys not used for `DURATION`, such as 90d; one never used counts from its creation"},
		&cli.BoolFlag{Name: "expired", Usage: "those that are expired"},
		&cli.BoolFlag{Name: "revoked", Usage: "those that were revoked, by hand, by a rotation or by a reset"},
		&cli.BoolFlag{Name: "all", Aliases: []string{"a"}, Usage: "those in any state"},
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
		req.State = states[0] // else every one is asked for, and chosen from here
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
	return keyTable(c, keys, time.Now())
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

// ago is how long something is past; what never was is "never".
func ago(t *timestamppb.Timestamp, now time.Time) string {
	if t == nil {
		return "never"
	}
	return age(now.Sub(t.AsTime())) + " ago"
}

// expiresIn is what is left of a key's life, also when a rotation ends it; or how it ended.
func expiresIn(k *adminv1.Key, now time.Time) string {
	switch k.GetState() {
	case adminv1.KeyState_KEY_STATE_REVOKED:
		return k.GetRevocation()
	case adminv1.KeyState_KEY_STATE_EXPIRED:
		return "expired"
	}
	end, why := k.GetExpiresAt(), ""
	if at := k.GetRevokedAt(); at != nil && (end == nil || at.AsTime().Before(end.AsTime())) {
		end, why = at, " ("+k.GetRevocation()+")"
	}
	if end == nil {
		return "never"
	}
	return age(end.AsTime().Sub(now)) + why
}
