//go:build !windows

package client

import "syscall"

// errConnectionRefused is the error of a connection to a port where nothing listens.
const errConnectionRefused = syscall.ECONNREFUSED
