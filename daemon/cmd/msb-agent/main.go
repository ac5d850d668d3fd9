// Command msb-agent is the only program in the initramfs of a microVM. It is the guest's init process (package agent). By the name
// /msb-portal it is also the portal in the container (package portal). So the guest needs memory for one program, and an emulator
// translates the code that both execute only once.
//
// Emulated machines are slow, so the packages that it imports must not do slow work before main.
package main

import (
	"github.com/msbd/msbd/daemon/internal/guest/agent"
	"github.com/msbd/msbd/daemon/internal/guest/portal"
)

func main() {
	agent.RunIfInit()
	portal.Main()
}
