// SPDX-License-Identifier: Apache-2.0

// Command containerd-shim-kata-v2 is the unmodified containerd shim of Kata Containers. containerd starts one per
// sandbox. The shim runs the microVM with Kata's own driver or with msbd's hypervisor service.
//
// It is a separate module so that it keeps the dependency versions that Kata was tested with. This file is Kata's own
// main (Copyright 2018 HyperHQ Inc., Apache License 2.0). Everything else comes from Kata's module, under the same
// license. Build it with build.sh.
package main

import (
	"fmt"
	"os"

	shimapi "github.com/containerd/containerd/runtime/v2/shim"
	shim "github.com/kata-containers/kata-containers/src/runtime/pkg/containerd-shim-v2"
	"github.com/kata-containers/kata-containers/src/runtime/pkg/katautils"
	"github.com/kata-containers/kata-containers/src/runtime/pkg/types"
)

func main() {
	if len(os.Args) == 2 && os.Args[1] == "--version" {
		fmt.Printf("%s containerd shim (Golang): id: %q, version: %s, commit: %v\n",
			katautils.PROJECT, types.DefaultKataRuntimeName, katautils.VERSION, katautils.COMMIT)
		return
	}
	shimapi.Run(types.DefaultKataRuntimeName, shim.New, func(config *shimapi.Config) {
		config.NoReaper = true
		config.NoSubreaper = true
	})
}
