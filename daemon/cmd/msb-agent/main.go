// Command msb-agent is the init process (/init) of a microVM's guest. See package agent.
package main

import "github.com/msbd/msbd/daemon/internal/guest/agent"

func main() { agent.Main() }
