package client

import "golang.org/x/sys/windows"

// errConnectionRefused is the error of a connection to a port where nothing listens.
const errConnectionRefused = windows.WSAECONNREFUSED
