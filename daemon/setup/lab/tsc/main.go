// Command tsc prints the speed of this processor's time stamp counter in kHz, for the kernel of the lab.
package main

import (
	"fmt"

	"github.com/msbd/msbd/daemon/internal/sys/tsc"
)

func main() { fmt.Println(tsc.KHz()) }
