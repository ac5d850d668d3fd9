package keys

import (
	"crypto/ed25519"
	"encoding/base64"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

const libraryPath = "github.com/o1egl/paseto"

// Only one file may use the PASETO library, and it may use only the safe part of it.
func TestLibraryIsUsedInOnePlace(t *testing.T) {
	root := filepath.Join("..", "..", "..", "..")
	var users int
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && (d.Name() == "bin" || strings.HasPrefix(d.Name(), ".") && d.Name() != "..") && path != root {
			return filepath.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		var name string
		for _, spec := range file.Imports {
			if imported, _ := strconv.Unquote(spec.Path.Value); imported == libraryPath {
				name = "paseto"
				if spec.Name != nil {
					name = spec.Name.Name
				}
			}
		}
		if name == "" {
			return nil
		}
		// These tests demonstrate the unsafe part of the library.
		if filepath.Dir(path) == filepath.Join(root, "daemon", "internal", "domain", "keys") && filepath.Base(path) == "library_test.go" {
			return nil
		}
		if path != filepath.Join(root, "daemon", "internal", "domain", "keys", "paseto.go") {
			t.Errorf("%s imports %s; only keys/paseto.go may", path, libraryPath)
		}
		users++
		ast.Inspect(file, func(n ast.Node) bool {
			sel, ok := n.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			switch sel.Sel.Name {
			case "Parse", "ParseFooter", "NewV1", "Encrypt", "Decrypt", "JSONToken":
				t.Errorf("%s uses %s", path, sel.Sel.Name)
			}
			if x, ok := sel.X.(*ast.Ident); ok && x.Name == name && sel.Sel.Name != "NewV2" {
				t.Errorf("%s uses %s.%s; only NewV2().Sign and .Verify are allowed", path, name, sel.Sel.Name)
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if users != 1 {
		t.Errorf("found %d files that import the library, want 1", users)
	}
}

func TestCanonicalBase64(t *testing.T) {
	strict := base64.RawURLEncoding.Strict()
	alphabet := "ABab01-_+/=.\n "
	for _, a := range alphabet {
		for _, b := range alphabet {
			for _, tail := range []string{"", "A", "AB", "ABC", "Ag"} {
				s := string(a) + string(b) + tail
				decoded, err := strict.DecodeString(s)
				want := err == nil && base64.RawURLEncoding.EncodeToString(decoded) == s
				if got := canonicalBase64(s); got != want {
					t.Errorf("canonicalBase64(%q) = %t", s, got)
				}
			}
		}
	}
}

// The library appends to its arguments. sign must not let it overwrite what follows them in memory.
func TestSignDoesNotModifyArguments(t *testing.T) {
	private := ed25519.NewKeyFromSeed(make([]byte, ed25519.SeedSize))
	backing := []byte("payload-and-what-follows-it" + strings.Repeat("x", 200))
	want := string(backing)
	if _, err := sign(private, backing[:7], []byte("footer")); err != nil {
		t.Fatal(err)
	}
	if string(backing) != want {
		t.Errorf("sign overwrote its caller's memory: %q", backing)
	}
}
