//go:build unix

package main

import (
	"os"
	"os/signal"
	"syscall"
)

// onResize calls resized when the size of msb's terminal changes, until stop is called.
func onResize(resized func()) (stop func()) {
	changes := make(chan os.Signal, 1)
	signal.Notify(changes, syscall.SIGWINCH)
	go func() {
		for range changes {
			resized()
		}
	}()
	return func() {
		signal.Stop(changes)
		close(changes)
	}
}
