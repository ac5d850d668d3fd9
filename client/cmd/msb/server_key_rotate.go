package main

import (
	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
)

var keyRotate = &cli.Command{
	Name:      "rotate",
	Usage:     "replace an API key with a new one that has the same name and limits",
	UsageText: "msb server key rotate [options] KEY",
	Description: "The new key is printed as by 'msb server keygen'. The old key is revoked at the end of the grace period, or\n" +
		"immediately if there is none.\n\n" + keyRefHelp + "\n\n" + envFileHelp,
	Flags: append([]cli.Flag{
		&cli.StringFlag{Name: "grace", Usage: "keep the old key valid for `DURATION`, such as 24h (default: revoke it immediately)"},
		&cli.StringFlag{Name: "expire", Usage: "let the new key expire after `DURATION`, see 'msb server keygen --help' (default: the lifetime of the old key)"},
	}, newKeyFlags...),
	Action: rotateKey,
}

func rotateKey(c *cli.Context) error {
	ref, err := oneKey(c)
	if err != nil {
		return err
	}
	return newKey(c, func(a *client.Admin) (newKeyInfo, error) {
		resp, err := a.RotateKey(c.Context, &adminv1.RotateKeyRequest{Ref: ref, Grace: c.String("grace"), Expire: c.String("expire")})
		if err != nil {
			return newKeyInfo{}, err
		}
		return newKeyInfo{secret: resp.GetKey(), key: resp.GetInfo(), old: resp.GetOld()}, nil
	})
}
