package main

import (
	"bufio"
	"errors"
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"
)

var yesFlag = &cli.BoolFlag{Name: "yes", Aliases: []string{"y"}, Usage: "do not ask for confirmation (msb asks only on a terminal)"}

// confirm asks the user to confirm consequence. It returns an error unless the answer is yes. It does not ask with --yes
// or if standard input is not a terminal.
func confirm(c *cli.Context, consequence string) error {
	if c.Bool(yesFlag.Name) || !isTerminal(c.App.Reader) {
		return nil
	}
	fmt.Fprint(c.App.ErrWriter, printable(consequence)+" Continue? [y/N] ")
	// Read in a goroutine: a read from a terminal cannot be cancelled, and Ctrl-C must not wait for it.
	answers := make(chan string, 1)
	go func() {
		answer, _ := bufio.NewReader(c.App.Reader).ReadString('\n')
		answers <- answer
	}()
	select {
	case answer := <-answers:
		if a := strings.ToLower(strings.TrimSpace(answer)); a == "y" || a == "yes" {
			return nil
		}
		return errors.New("nothing was changed")
	case <-c.Context.Done():
		fmt.Fprintln(c.App.ErrWriter)
		return errors.New("interrupted; nothing was changed")
	}
}
