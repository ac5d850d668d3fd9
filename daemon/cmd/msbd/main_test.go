package main

import (
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/msbd/msbd/daemon/internal/backend/host"
)

func TestMain(m *testing.M) {
	host.MaybeProbeChild() // as in main, which a child would else not reach
	testscript.Main(m, map[string]func(){"msbd": main})
}

// What msbd says without starting.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata"})
}
