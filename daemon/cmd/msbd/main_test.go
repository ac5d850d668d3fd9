package main

import (
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/msbd/msbd/daemon/internal/backend/host"
	"github.com/msbd/msbd/daemon/internal/data/store"
)

func TestMain(m *testing.M) {
	host.MaybeProbeChild() // as in main, which a child would else not reach
	store.MaybeCheckChild()
	testscript.Main(m, map[string]func(){"msbd": main})
}

// What msbd says without starting.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata"})
}
