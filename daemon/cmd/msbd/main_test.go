package main

import (
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/msbd/msbd/daemon/internal/backend/host"
	"github.com/msbd/msbd/daemon/internal/data/store"
)

func TestMain(m *testing.M) {
	host.RunProbeIfChild() // call these here as main does, because a child process runs TestMain instead of main
	store.RunCheckIfChild()
	testscript.Main(m, map[string]func(){"msbd": main})
}

// TestScripts runs the commands of msbd that do not start the server.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata"})
}
