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

// readInternals returns the text of a file in docs/internals.
func readInternals(t *testing.T, name string) string {
	t.Helper()
	return readFile(t, filepath.Join("..", "docs", "internals", name))
}

// source is what the Go files of this repository declare. Directories are relative to its root.
type source struct {
	dirs  map[string]bool            // directories of packages; true if there are Go files other than tests
	tests map[string][]string        // from the name of a test to the directories that have it
	names map[string]map[string]bool // from the name of a package to its names: F, and T.M for a method or field M of T
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

// receiver returns the name of the type in a method's receiver.
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

// TestSecurityDocNamesTests checks that every test named in docs/internals/security.md exists in the package named
// before it.
func TestSecurityDocNamesTests(t *testing.T) {
	code := readSource(t)
	span := regexp.MustCompile("`([^`]+)`(:?)")
	rows, promises := 0, false
	for line := range strings.Lines(readInternals(t, "security.md")) {
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
				// The document may name only the end of a directory's path.
				if !slices.ContainsFunc(code.tests[m[1]], func(d string) bool { return strings.HasSuffix("/"+d, "/"+dir) }) {
					t.Errorf("docs/internals/security.md: no test %s in %q; tests of that name are in %q", m[1], dir, code.tests[m[1]])
				}
			}
			if tests == 0 {
				t.Errorf("docs/internals/security.md: promise without a test: %s", line)
			}
		}
	}
	if rows < 40 {
		t.Errorf("docs/internals/security.md: found only %d promises, want at least 40", rows)
	}
}

// TestArchitectureDocListsPackages checks that docs/internals/architecture.md has a row for every package below
// daemon/internal, and none for a package that does not exist.
func TestArchitectureDocListsPackages(t *testing.T) {
	listed := map[string]bool{}
	row := regexp.MustCompile("^\\| `((?:serve|domain|backend|guest|data|sys)(?:/[a-z/]+)?)` \\|")
	for line := range strings.Lines(readInternals(t, "architecture.md")) {
		if m := row.FindStringSubmatch(line); m != nil {
			listed[m[1]] = true
		}
	}
	for dir, is := range readSource(t).dirs {
		if name, internal := strings.CutPrefix(dir, "daemon/internal/"); internal && is && !listed[name] {
			t.Errorf("docs/internals/architecture.md has no row for package %s", name)
		}
	}
	for name := range listed {
		if info, err := os.Stat(filepath.Join("internal", name)); err != nil || !info.IsDir() {
			t.Errorf("docs/internals/architecture.md has a row for %s, which is not a package: %v", name, err)
		}
	}
}

// TestMaintainerDocsNameCode checks that the code named in the maintainer documentation exists: package.Name,
// package.Type.Method, tests and paths of Go files.
func TestMaintainerDocsNameCode(t *testing.T) {
	code := readSource(t)
	goName := regexp.MustCompile(`^([a-z]+)\.([A-Z]\w*(?:\.[A-Z]\w*)?)$`)
	goFile := regexp.MustCompile(`^[a-z0-9_/]+\.go$`)
	goTest := regexp.MustCompile(`^(Test|Fuzz|Benchmark)[A-Z]\w*$`)
	found := 0
	for _, file := range []string{"README.md", "architecture.md", "request-lifecycle.md", "testing.md"} {
		for _, m := range regexp.MustCompile("`([^`\n]+)`").FindAllStringSubmatch(readInternals(t, file), -1) {
			if name := goName.FindStringSubmatch(m[1]); name != nil {
				found++
				if !code.names[name[1]][name[2]] {
					t.Errorf("docs/internals/%s: no %s in the code", file, m[1])
				}
			}
			if goTest.MatchString(m[1]) {
				found++
				if len(code.tests[m[1]]) == 0 {
					t.Errorf("docs/internals/%s: no test %s", file, m[1])
				}
			}
			if goFile.MatchString(m[1]) {
				found++
				_, err := os.Stat(filepath.Join("..", m[1]))
				if err != nil { // the path may be relative to daemon/internal
					_, err = os.Stat(filepath.Join("internal", m[1]))
				}
				if err != nil {
					t.Errorf("docs/internals/%s: no file %s", file, m[1])
				}
			}
		}
	}
	if found < 40 {
		t.Errorf("found only %d names of code, want at least 40", found)
	}
}

// TestDocLinks checks that every relative link in the documentation leads to a file, and to a heading if it names one.
func TestDocLinks(t *testing.T) {
	var files []string
	for _, pattern := range []string{"../README.md", "../CHANGELOG.md", "../docs/*.md", "../docs/internals/*.md", "../client/*/README.md"} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, found...)
	}
	link := regexp.MustCompile(`\]\(([^)\s]+)\)`)
	links := 0
	for _, file := range files {
		for _, m := range link.FindAllStringSubmatch(readFile(t, file), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			links++
			path, anchor, _ := strings.Cut(m[1], "#")
			target := file
			if path != "" {
				target = filepath.Join(filepath.Dir(file), path)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: link to %s: %v", file, m[1], err)
				continue
			}
			if anchor != "" && !slices.Contains(anchors(readFile(t, target)), anchor) {
				t.Errorf("%s: link to %s: no such heading", file, m[1])
			}
		}
	}
	if links < 20 {
		t.Errorf("found only %d links, want at least 20", links)
	}
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// anchors returns the anchors that GitHub gives to the headings of a Markdown document: lower case, with hyphens for
// spaces and without punctuation.
func anchors(text string) (all []string) {
	heading := regexp.MustCompile(`(?m)^#+ (.+)$`)
	dropped := regexp.MustCompile(`[^\p{L}\p{N} _-]`)
	for _, m := range heading.FindAllStringSubmatch(text, -1) {
		all = append(all, strings.ReplaceAll(dropped.ReplaceAllString(strings.ToLower(m[1]), ""), " ", "-"))
	}
	return all
}
