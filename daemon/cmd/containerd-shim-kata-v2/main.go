// SPDX-License-Identifier: Apache-2.0

// Command containerd-shim-kata-v2 is Kata Containers' containerd shim, unmodified: containerd
// starts one per sandbox, and it drives the microVM through the hypervisor service of msbd.
//
// It is a module of its own, so that it keeps the dependency versions that Kata was tested with.
// This file is Kata's own main (Copyright 2018 HyperHQ Inc., Apache License 2.0); everything else
// comes from Kata's module, under the same licence. build.sh says how it is built.
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
