package main

import (
	"bufio"
	"errors"
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"
)

var yesFlag = &cli.BoolFlag{Name: "yes", Aliases: []string{"y"}, Usage: "do not ask for confirmation; required if standard input is not a terminal"}

// confirm asks the user on the terminal to confirm consequence. It returns an error unless the answer is yes. Without a
// terminal it cannot ask, so it requires --yes: whatever is on standard input is not an answer.
func confirm(c *cli.Context, consequence string) error {
	if c.Bool(yesFlag.Name) {
		return nil
	}
	if !isTerminal(c.App.Reader) {
		return cli.Exit(consequence+" Nothing was changed, because msb can ask for confirmation only on a terminal: add --yes to confirm", exitUsage)
	}
	fmt.Fprint(c.App.ErrWriter, printable(consequence)+" Continue? [y/N] ")
	// Read in a goroutine: a read from a terminal cannot be canceled, and Ctrl-C must not wait for it.
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
		if !strings.HasSuffix(answer, "\n") { // the user pressed Ctrl-D
			fmt.Fprintln(c.App.ErrWriter)
		}
		return errors.New("nothing was changed")
	case <-c.Context.Done():
		fmt.Fprintln(c.App.ErrWriter)
		return cli.Exit("interrupted; nothing was changed", exitInterrupted)
	}
}
