package main

import (
	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
)

var keyRotate = &cli.Command{
	Name:      "rotate",
	Usage:     "replace an API key by a new one of the same name and limits",
	UsageText: "msb server key rotate KEY [--grace DURATION] [--expire DURATION]",
	Description: "The new key is handed over as that of 'msb server keygen'. The old one is refused when the grace period is\n" +
		"over; without one, at once.\n\n" + keyRefHelp + "\n\n" + envFileHelp,
	Flags: append([]cli.Flag{
		&cli.StringFlag{Name: "grace", Usage: "accept the old key for `DURATION` more, such as 24h (default: not at all)"},
		&cli.StringFlag{Name: "expire", Usage: "the new key's life, `DURATION`, as of keygen (default: as long as the old key's was)"},
	}, newKeyFlags...),
	Action: rotateKey,
}

func rotateKey(c *cli.Context) error {
	ref, err := oneKey(c)
	if err != nil {
		return err
	}
	return newKey(c, func(a *client.Admin) (made newKeyInfo, err error) {
		resp, err := a.RotateKey(c.Context, &adminv1.RotateKeyRequest{Ref: ref, Grace: c.String("grace"), Expire: c.String("expire")})
		if err != nil {
			return made, err
		}
		return newKeyInfo{secret: resp.GetKey(), key: resp.GetInfo(), old: resp.GetOld()}, nil
	})
}
