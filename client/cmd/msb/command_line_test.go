package main

import (
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/urfave/cli/v2"
)

func TestFlagsFirst(t *testing.T) {
	run := &cli.Command{Name: "run", Flags: []cli.Flag{&cli.BoolFlag{Name: "it", Aliases: []string{"i"}}, &cli.StringFlag{Name: "user"}}}
	passesThrough[run] = true
	defer delete(passesThrough, run)
	app := &cli.App{
		Flags: []cli.Flag{&cli.StringFlag{Name: "socket"}},
		Commands: []*cli.Command{
			{Name: "key", Subcommands: []*cli.Command{{
				Name: "revoke", Aliases: []string{"rm"},
				Flags: []cli.Flag{&cli.BoolFlag{Name: "yes", Aliases: []string{"y"}}, &cli.StringFlag{Name: "for", Aliases: []string{"f"}}, &cli.StringSliceFlag{Name: "ns"}},
			}}},
			run,
			{Name: "sandbox", Subcommands: []*cli.Command{{Name: "stop", Aliases: []string{"rm"}, Flags: []cli.Flag{&cli.BoolFlag{Name: "now"}}}}},
			{Name: "as-it-is", SkipFlagParsing: true},
		},
	}
	for line, want := range map[string]string{
		"msb":                                     "msb",
		"msb --socket s key revoke a":             "msb --socket s key revoke a",
		"msb key revoke a --yes":                  "msb key revoke --yes a",
		"msb key revoke a b -y c":                 "msb key revoke -y a b c",
		"msb key rm a --for 1d --ns x b --ns=y":   "msb key revoke --for 1d --ns x --ns=y a b",
		"msb key revoke -f -y a":                  "msb key revoke -f -y a", // -y is the value of -f
		"msb key revoke a -- --yes b":             "msb key revoke -- a --yes b",
		"msb key revoke - --yes":                  "msb key revoke --yes -",
		"msb key revoke a --for":                  "msb key revoke --for", // a must not become the value
		"msb key revoke a --unknown b":            "msb key revoke --unknown a b",
		"msb key revoke revoke --yes":             "msb key revoke --yes revoke",
		"msb key unknown a --yes":                 "msb key unknown a --yes",
		"msb run box ls -la --user":               "msb run -- box ls -la --user",
		"msb run box --user u -i ls -i":           "msb run -- box --user u -i ls -i",
		"msb run --user u -i box -- ls -i":        "msb run --user u -i -- box -- ls -i",
		"msb rm a --now":                          "msb sandbox stop --now a", // the word sandbox can be omitted
		"msb sandbox rm a --now":                  "msb sandbox stop --now a",
		"msb --socket s stop a":                   "msb --socket s sandbox stop a",
		"msb key stop a":                          "msb key stop a",
		"msb as-it-is a --yes":                    "msb as-it-is a --yes",
		"msb --socket key revoke a --yes":         "msb --socket key revoke a --yes", // key is the value of --socket, so there is no command
		"msb --socket=x key revoke a --for=y --y": "msb --socket=x key revoke --for=y --y a",
	} {
		if diff := cmp.Diff(strings.Fields(want), flagsFirst(app, strings.Fields(line))); diff != "" {
			t.Errorf("%s: %s", line, diff)
		}
	}
}

// The commands for the server's own host refuse to run on other systems, and their help works.
func TestServerCommandsNeedLinux(t *testing.T) {
	for system, refused := range map[string]bool{"linux": false, "darwin": true, "windows": true} {
		ran := false
		server := &cli.Command{Name: "server", Subcommands: []*cli.Command{{
			Name: "start", Action: func(*cli.Context) error { ran = true; return nil },
		}}}
		requireLinux(system, server)
		app := &cli.App{Name: "msb", Writer: io.Discard, ExitErrHandler: func(*cli.Context, error) {}, Commands: []*cli.Command{server}}
		err := app.Run([]string{"msb", "server", "start"})
		if ran == refused || refused && (err == nil || !strings.Contains(err.Error(), "the server runs on Linux only: run 'msb server start' on its host")) {
			t.Errorf("%s: ran: %t, error: %v", system, ran, err)
		}
		if err := app.Run([]string{"msb", "server", "start", "--help"}); err != nil {
			t.Errorf("%s: --help: %v", system, err)
		}
	}
}
