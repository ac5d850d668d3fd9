package main

import (
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
)

var clockAccept = &cli.Command{
	Name:      "accept",
	Usage:     "make the server use the current time of its host's clock",
	UsageText: "msb server clock accept [options]",
	Description: "API keys expire by a clock that never goes back. So if the host's clock was ahead and was then corrected, the\n" +
		"server keeps the later time and creates no API keys. Check that the clock is right now, then run this command.\n" +
		"Keys that expired by the later time become valid again. Keys with an expiry that were created meanwhile are\n" +
		"revoked, because they would be valid for too long. Keys that were revoked stay revoked.\n\n" +
		"If the host's clock was set forward by more than 5 minutes, the server uses the new time once the clock has\n" +
		"stayed there for 5 minutes. This command makes it use the new time at once.",
	Flags: []cli.Flag{yesFlag},
	Action: func(c *cli.Context) error {
		if err := noArguments(c); err != nil {
			return err
		}
		a := admin(c)
		defer a.Close()
		preview, err := a.AcceptClock(c.Context, true)
		if err != nil {
			return err
		}
		if preview.GetFrom().AsTime().Equal(preview.GetTo().AsTime()) {
			fmt.Fprintf(c.App.ErrWriter, "the server already uses the time of its host's clock, %s\n", localTime(preview.GetTo()))
			return nil
		}
		if err := confirm(c, "This changes the server's time "+describeClock(preview)+"."); err != nil {
			return err
		}
		accepted, err := a.AcceptClock(c.Context, false)
		if err != nil {
			return err
		}
		fmt.Fprintf(c.App.ErrWriter, "the server's time was changed %s\n", describeClock(accepted))
		return nil
	},
}

// describeClock describes a change of the server's time and its consequences, for use in a sentence.
func describeClock(r *adminv1.AcceptClockResponse) string {
	text := fmt.Sprintf("from %s to %s", localTime(r.GetFrom()), localTime(r.GetTo()))
	var effects []string
	for _, effect := range []struct {
		n         int32
		one, many string
	}{
		{r.GetRevived(), "expired API key becomes valid again", "expired API keys become valid again"},
		{r.GetExpired(), "API key expires", "API keys expire"},
		{r.GetRevoked(), "API key that was created at a later time is revoked", "API keys that were created at a later time are revoked"},
	} {
		if effect.n > 0 {
			effects = append(effects, plural(effect.n, effect.one, effect.many))
		}
	}
	if len(effects) == 0 {
		return text + ": no API key is affected"
	}
	return text + ": " + strings.Join(effects, ", ")
}
