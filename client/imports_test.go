package client

import (
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/msbd/msbd/"

// pkg is what `go list` says of a package; paths are without the module's.
type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

// ours lists the packages of this module.
func ours(t *testing.T) []pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,Deps", module+"...")
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v\n%s", err, stderr.String())
	}
	var packages []pkg
	for d := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		local := func(paths []string) (out []string) {
			for _, path := range paths {
				if path, ok := strings.CutPrefix(path, module); ok {
					out = append(out, path)
				}
			}
			return out
		}
		p.ImportPath = strings.TrimPrefix(p.ImportPath, module)
		p.Imports, p.Deps = local(p.Imports), local(p.Deps)
		packages = append(packages, p)
	}
	if len(packages) < 10 {
		t.Fatalf("go list found only %d packages", len(packages))
	}
	return packages
}

func in(path, tree string) bool { return path == tree || strings.HasPrefix(path, tree+"/") }

// The client stays thin, and the contracts stay independent.
func TestClientHoldsNothingOfTheDaemon(t *testing.T) {
	for _, p := range ours(t) {
		for _, dep := range p.Deps {
			switch {
			case in(p.ImportPath, "client") && !in(dep, "client") && !in(dep, "api"),
				in(p.ImportPath, "api") && !in(dep, "api"):
				t.Errorf("%s depends on %s", p.ImportPath, dep)
			}
		}
	}
}

// TestImportDirection holds the rule of docs/internals/architecture.md. Only package daemon and the commands import packages of
// more than one group. The package that is a group's root, such as backend, connects the packages of the group: it may
// import all of them, and none of them imports it.
func TestImportDirection(t *testing.T) {
	const internal = "daemon/internal/"
	// The packages of each group that others of the group may import.
	base := map[string][]string{
		"serve":   {"http", "rpcerr"},
		"domain":  {"name"},
		"backend": {"containerd", "disk", "hypervisor", "network"},
		"guest":   nil,
		"data":    {"store"},
		"sys":     nil,
	}
	for _, p := range ours(t) {
		path, ok := strings.CutPrefix(p.ImportPath, internal)
		if !ok {
			continue
		}
		group, rest, _ := strings.Cut(path, "/")
		room, _, _ := strings.Cut(rest, "/")
		if _, known := base[group]; !known {
			t.Errorf("%s is in none of the groups", p.ImportPath)
		}
		if forTests(p.ImportPath) {
			continue
		}
		for _, imported := range p.Imports {
			if forTests(imported) {
				t.Errorf("%s imports %s, which is for tests", p.ImportPath, imported)
			}
			if !mayImport(base, group, room, strings.TrimPrefix(imported, internal)) {
				t.Errorf("%s imports %s", p.ImportPath, imported)
			}
		}
	}
}

// forTests reports whether a package has what tests of other packages share, such as sandboxtest. Only tests import it,
// and it may import what they test.
func forTests(path string) bool {
	return strings.HasPrefix(path, "daemon/") && strings.HasSuffix(path, "test")
}

// mayImport reports whether a package in base's group and room may import a package, whose path is without internal.
func mayImport(base map[string][]string, group, room, imported string) bool {
	otherGroup, rest, _ := strings.Cut(imported, "/")
	otherRoom, _, _ := strings.Cut(rest, "/")
	_, internal := base[otherGroup]
	switch {
	case !internal && group == "domain":
		return imported == "api/audit"
	case !internal:
		return in(imported, "api") && group != "sys"
	case otherGroup == group:
		return room == "" || otherRoom == room || slices.Contains(base[group], otherRoom)
	case otherGroup == "sys":
		return true
	case otherGroup == "domain":
		return group != "sys"
	}
	return false
}
