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

// Imports go one way: cmd → daemon → adapters → domain.
func TestImportDirection(t *testing.T) {
	const internal = "daemon/internal/"
	domain := map[string][]string{ // and what each may import
		"sandbox": nil,
		"token":   {"sandbox"},
	}
	// Besides the domain, an adapter may enter these rooms: their common vocabulary for errors, and the hold on processes.
	common := []string{"rpcerr", "process"}
	const auditLog = "api/audit"
	for _, p := range ours(t) {
		path, ok := strings.CutPrefix(p.ImportPath, internal)
		if !ok {
			continue
		}
		room, _, _ := strings.Cut(path, "/")
		allowed, isDomain := domain[room]
		for _, imported := range p.Imports {
			other, ok := strings.CutPrefix(imported, internal)
			other, _, _ = strings.Cut(other, "/")
			_, otherIsDomain := domain[other]
			switch {
			case !ok && in(imported, "api") && !isDomain:
			case imported == auditLog: // what the domain reports to it
			case ok && other == room:
			case ok && isDomain && slices.Contains(allowed, other):
			case ok && !isDomain && (otherIsDomain || slices.Contains(common, other)):
			default:
				t.Errorf("%s imports %s", p.ImportPath, imported)
			}
		}
	}
}
