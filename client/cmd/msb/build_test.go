package main

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/tools/go/packages"
)

// The command line, its client and their tests compile on every system that users of msb have. The types are checked from
// the source, because compiling the standard library for each system would take minutes.
func TestTypesOnEverySystem(t *testing.T) {
	t.Parallel()
	client, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, target := range []struct{ system, arch string }{
		{"darwin", "amd64"}, {"darwin", "arm64"}, {"windows", "amd64"}, {"windows", "arm64"}, {"linux", "arm64"},
	} {
		t.Run(target.system+"/"+target.arch, func(t *testing.T) {
			loaded, err := packages.Load(&packages.Config{
				Mode: packages.LoadAllSyntax, Tests: true, Context: t.Context(), Dir: client,
				Env: append(os.Environ(), "GOOS="+target.system, "GOARCH="+target.arch, "CGO_ENABLED=0"),
				ParseFile: func(files *token.FileSet, path string, text []byte) (*ast.File, error) {
					file, err := parser.ParseFile(files, path, text, parser.SkipObjectResolution)
					if file != nil && !strings.HasPrefix(path, client) {
						// Of other packages, only the declarations matter.
						for _, decl := range file.Decls {
							if f, ok := decl.(*ast.FuncDecl); ok {
								f.Body = nil
							}
						}
					}
					return file, err
				},
			}, "./...")
			if err != nil {
				t.Fatal(err)
			}
			if len(loaded) < 4 { // two packages and their tests
				t.Errorf("only %d packages", len(loaded))
			}
			for _, p := range loaded {
				if strings.HasSuffix(p.ID, ".test") {
					continue // a main function that the go command generated
				}
				for _, err := range p.Errors {
					t.Errorf("%s: %v", p.ID, err)
				}
			}
		})
	}
}
