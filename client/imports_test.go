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

// pkg is the output of `go list` for a package. Paths are relative to the module.
type pkg struct {
	ImportPath string
	Imports    []string
	Deps       []string
}

// listPackages returns the packages of this module.
func listPackages(t *testing.T) []pkg {
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

// Package client depends only on the contracts in api, and these depend on no other package of this module.
func TestClientDoesNotImportDaemon(t *testing.T) {
	for _, p := range listPackages(t) {
		for _, dep := range p.Deps {
			switch {
			case in(p.ImportPath, "client") && !in(dep, "client") && !in(dep, "api"),
				in(p.ImportPath, "api") && !in(dep, "api"):
				t.Errorf("%s depends on %s", p.ImportPath, dep)
			}
		}
	}
}

// TestImportDirection checks the rule of docs/internals/architecture.md. Every group may import sys, and every group but sys may
// import domain. There are no other imports between groups: package daemon, which is in none of them, connects all groups.
// The package that is a group's root, such as backend, connects the packages of the group: it may import all of them, and
// none of them imports it.
func TestImportDirection(t *testing.T) {
	const internal = "daemon/internal/"
	// The packages of each group that others of the group may import.
	base := map[string][]string{
		"serve":   {"http", "rpcerr", "wire"},
		"domain":  {"name"},
		"backend": {"containerd", "disk", "hypervisor", "network"},
		"guest":   nil,
		"data":    {"store"},
		"sys":     nil,
	}
	for _, p := range listPackages(t) {
		path, ok := strings.CutPrefix(p.ImportPath, internal)
		if !ok {
			continue
		}
		group, rest, _ := strings.Cut(path, "/")
		name, _, _ := strings.Cut(rest, "/")
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
			if !mayImport(base, group, name, strings.TrimPrefix(imported, internal)) {
				t.Errorf("%s imports %s", p.ImportPath, imported)
			}
		}
	}
}

// forTests reports whether a package contains code that the tests of other packages share, such as sandboxtest. Only
// tests import it, and it may import the packages that they test.
func forTests(path string) bool {
	return strings.HasPrefix(path, "daemon/") && strings.HasSuffix(path, "test")
}

// mayImport reports whether the package name in group may import another package. name is empty for the group's root.
// imported is a path relative to daemon/internal, or to the module if the package is elsewhere.
func mayImport(base map[string][]string, group, name, imported string) bool {
	otherGroup, rest, _ := strings.Cut(imported, "/")
	otherName, _, _ := strings.Cut(rest, "/")
	_, internal := base[otherGroup]
	switch {
	case !internal && group == "domain":
		return imported == "api/audit"
	case !internal:
		return in(imported, "api") && group != "sys"
	case otherGroup == group:
		return name == "" || otherName == name || slices.Contains(base[group], otherName)
	case otherGroup == "sys":
		return true
	case otherGroup == "domain":
		return group != "sys"
	}
	return false
}
