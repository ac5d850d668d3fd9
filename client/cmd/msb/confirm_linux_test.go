package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"strings"
	"testing"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/daemon/daemontest"
)

// Ctrl-C interrupts confirm while it waits for an answer.
func TestConfirmIsInterrupted(t *testing.T) {
	_, terminal := daemontest.OpenTerminal(t)
	asked, question := io.Pipe()
	defer question.Close()
	ctx, interrupt := context.WithCancel(t.Context())
	c := cli.NewContext(&cli.App{Reader: terminal, ErrWriter: question}, flag.NewFlagSet("", 0), &cli.Context{Context: ctx})
	answer := make(chan error, 1)
	go func() { answer <- confirm(c, "This is \x1b[1mdangerous.") }()
	text := make([]byte, 100)
	n, err := asked.Read(text)
	if got := string(text[:n]); err != nil || got != `This is \x1b[1mdangerous. Continue? [y/N] ` {
		t.Errorf("asked %q, %v", got, err)
	}
	interrupt()
	go io.Copy(io.Discard, asked)
	err = <-answer
	var coded cli.ExitCoder
	if !errors.As(err, &coded) || coded.ExitCode() != exitInterrupted || !strings.Contains(err.Error(), "interrupted; nothing was changed") {
		t.Errorf("got %v", err)
	}
}
