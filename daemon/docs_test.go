package daemon

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// docsFile returns the text of a file in docs.
func docsFile(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "docs", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// source is what the Go files of this repository declare.
type source struct {
	dirs  map[string]bool            // that have Go files other than tests; relative to the repository
	tests map[string][]string        // directories, by the name of a test
	names map[string]map[string]bool // by the name of a package: F, and T.M for the methods and fields of T
}

func readSource(t *testing.T) source {
	t.Helper()
	s := source{dirs: map[string]bool{}, tests: map[string][]string{}, names: map[string]map[string]bool{}}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() {
			if skip := []string{".git", "bin", "testdata", "node_modules"}; slices.Contains(skip, d.Name()) {
				return filepath.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(path, ".go") {
			return nil
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		s.add(filepath.Dir(strings.TrimPrefix(path, "../")), strings.HasSuffix(path, "_test.go"), file)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s source) add(dir string, isTest bool, file *ast.File) {
	names := s.names[file.Name.Name]
	if names == nil {
		names = map[string]bool{}
		s.names[file.Name.Name] = names
	}
	s.dirs[dir] = s.dirs[dir] || !isTest
	for _, d := range file.Decls {
		switch d := d.(type) {
		case *ast.FuncDecl:
			switch {
			case d.Recv != nil:
				names[receiver(d.Recv.List[0].Type)+"."+d.Name.Name] = true
			case isTest:
				s.tests[d.Name.Name] = append(s.tests[d.Name.Name], dir)
			default:
				names[d.Name.Name] = true
			}
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				switch spec := spec.(type) {
				case *ast.TypeSpec:
					addType(names, spec)
				case *ast.ValueSpec:
					for _, name := range spec.Names {
						names[name.Name] = true
					}
				}
			}
		}
	}
}

func addType(names map[string]bool, spec *ast.TypeSpec) {
	names[spec.Name.Name] = true
	var members *ast.FieldList
	switch of := spec.Type.(type) {
	case *ast.StructType:
		members = of.Fields
	case *ast.InterfaceType:
		members = of.Methods
	default:
		return
	}
	for _, member := range members.List {
		for _, name := range member.Names {
			names[spec.Name.Name+"."+name.Name] = true
		}
	}
}

// receiver returns the name of a method's type.
func receiver(of ast.Expr) string {
	for {
		switch e := of.(type) {
		case *ast.StarExpr:
			of = e.X
		case *ast.IndexExpr:
			of = e.X
		case *ast.IndexListExpr:
			of = e.X
		case *ast.Ident:
			return e.Name
		default:
			return ""
		}
	}
}

// Every test that docs/security.md names exists, in the package that it names.
func TestSecurityDocNamesTests(t *testing.T) {
	code := readSource(t)
	span := regexp.MustCompile("`([^`]+)`(:?)")
	rows, promises := 0, false
	for line := range strings.Lines(docsFile(t, "security.md")) {
		line = strings.TrimSpace(line)
		switch {
		case line == "| Promise | Test |":
			promises = true
		case !strings.HasPrefix(line, "|"):
			promises = false
		case promises && !strings.HasPrefix(line, "|---"):
			rows++
			cells := strings.Split(strings.Trim(line, "|"), "|")
			dir, tests := "", 0
			for _, m := range span.FindAllStringSubmatch(cells[len(cells)-1], -1) {
				if m[2] == ":" {
					dir = m[1]
					continue
				}
				tests++
				// A directory may be named by its end.
				if !slices.ContainsFunc(code.tests[m[1]], func(d string) bool { return strings.HasSuffix("/"+d, "/"+dir) }) {
					t.Errorf("docs/security.md: there is no test %s in %q; it is in %q", m[1], dir, code.tests[m[1]])
				}
			}
			if tests == 0 {
				t.Errorf("docs/security.md: a promise without a test: %s", line)
			}
		}
	}
	if rows < 40 {
		t.Errorf("docs/security.md: only %d promises were found", rows)
	}
}

// docs/architecture.md has a row for every package below daemon/internal, and for no other.
func TestArchitectureDocListsPackages(t *testing.T) {
	listed := map[string]bool{}
	row := regexp.MustCompile("^\\| `((?:serve|domain|backend|guest|data|sys)(?:/[a-z/]+)?)` \\|")
	for line := range strings.Lines(docsFile(t, "architecture.md")) {
		if m := row.FindStringSubmatch(line); m != nil {
			listed[m[1]] = true
		}
	}
	for dir, is := range readSource(t).dirs {
		if name, internal := strings.CutPrefix(dir, "daemon/internal/"); internal && is && !listed[name] {
			t.Errorf("docs/architecture.md lists no package %s", name)
		}
	}
	for name := range listed {
		if info, err := os.Stat(filepath.Join("internal", name)); err != nil || !info.IsDir() {
			t.Errorf("docs/architecture.md lists %s: %v", name, err)
		}
	}
}

// What the docs for maintainers name of the code exists: package.Name, package.Type.Method and paths of Go files.
func TestMaintainerDocsNameCode(t *testing.T) {
	code := readSource(t)
	goName := regexp.MustCompile(`^([a-z]+)\.([A-Z]\w*(?:\.[A-Z]\w*)?)$`)
	goFile := regexp.MustCompile(`^[a-z0-9_/]+\.go$`)
	found := 0
	for _, file := range []string{"architecture.md", "request-lifecycle.md"} {
		for _, m := range regexp.MustCompile("`([^`\n]+)`").FindAllStringSubmatch(docsFile(t, file), -1) {
			if name := goName.FindStringSubmatch(m[1]); name != nil {
				found++
				if !code.names[name[1]][name[2]] {
					t.Errorf("docs/%s: there is no %s", file, m[1])
				}
			}
			if goFile.MatchString(m[1]) {
				found++
				_, err := os.Stat(filepath.Join("..", m[1]))
				if err != nil { // the path is within daemon/internal
					_, err = os.Stat(filepath.Join("internal", m[1]))
				}
				if err != nil {
					t.Errorf("docs/%s: there is no file %s", file, m[1])
				}
			}
		}
	}
	if found < 40 {
		t.Errorf("only %d names of code were found", found)
	}
}
