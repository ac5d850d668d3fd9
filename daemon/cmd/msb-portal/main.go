// Command msb-portal is the helper inside each sandbox.
//
//	msb-portal serve [SOCKET]        run code and commands for msbd; this is the container's main process
//	msb-portal connect [SOCKET]      connect stdin and stdout to the process that serves
//	msb-portal transfer ID [SOCKET]  the same, for the data of the transfer that it has offered with this id
//	msb-portal version               print the version
//
// Sandboxes of Kata's own driver run it. In others, msb-agent is this program.
package main

import "github.com/msbd/msbd/daemon/internal/guest/portal"

func main() { portal.Main() }
