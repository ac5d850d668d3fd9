package main

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

func TestFetch(t *testing.T) {
	content := "right"
	requests := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		requests++
		if r.URL.Path != "/a/file.tgz" {
			http.NotFound(w, r)
			return
		}
		w.Write([]byte(content))
	}))
	defer server.Close()
	cache := filepath.Join(t.TempDir(), "cache")
	d := download{server.URL + "/a/file.tgz", digest.SHA512.FromString("right")}
	fetch := func(wantRequests int) {
		t.Helper()
		path, err := d.fetch(t.Context(), cache)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != "right" {
			t.Errorf("the file has %q, %v", got, err)
		}
		if requests != wantRequests {
			t.Errorf("%d requests, want %d", requests, wantRequests)
		}
	}
	fetch(1)
	fetch(1)
	// A file in the cache that was changed is not used.
	if err := os.WriteFile(filepath.Join(cache, "file.tgz"), []byte("wrong"), 0o600); err != nil {
		t.Fatal(err)
	}
	fetch(2)

	cache = t.TempDir()
	content = "wrong"
	if _, err := d.fetch(t.Context(), cache); err == nil || !strings.Contains(err.Error(), "/a/file.tgz: the digest is sha512:") {
		t.Errorf("a file with another digest: got error %v", err)
	}
	d.url = server.URL + "/absent"
	if _, err := d.fetch(t.Context(), cache); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("a file that does not exist: got error %v", err)
	}
	if left, err := os.ReadDir(cache); err != nil || len(left) != 0 {
		t.Errorf("downloads that failed left %v, %v", left, err)
	}
}

// On each architecture, the image code-interpreter has the same packages in the same versions.
func TestDownloadsOfEachArchitecture(t *testing.T) {
	packages := func(arch string) (names []string) {
		t.Helper()
		for _, p := range recipes["code-interpreter"].parts {
			if p.downloads == nil {
				continue
			}
			downloads, err := p.downloads(arch)
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range downloads {
				name := filepath.Base(d.url)
				if wheel := strings.SplitN(name, "-", 3); strings.HasSuffix(name, ".whl") {
					name = wheel[0] + " " + wheel[1]
				}
				names = append(names, strings.NewReplacer("-x64-", "-", "-arm64-", "-").Replace(name))
			}
		}
		slices.Sort(names)
		return names
	}
	intel, arm := packages("amd64"), packages("arm64")
	if diff := cmp.Diff(intel, arm); diff != "" {
		t.Errorf("downloads for amd64 and arm64 (-amd64 +arm64):\n%s", diff)
	}
	if len(slices.Compact(intel)) != len(arm) {
		t.Errorf("a download is doubled: %v", arm)
	}
	for _, name := range []string{"node-linux-" + nodeVersion, "npm-" + npmVersion, "numpy ", "pandas ", "matplotlib ", "scipy ", "requests ", "pillow "} {
		if !slices.ContainsFunc(arm, func(d string) bool { return strings.HasPrefix(d, name) }) {
			t.Errorf("%s is missing: %v", name, arm)
		}
	}
	for _, p := range recipes["code-interpreter"].parts {
		if p.downloads == nil {
			continue
		}
		if _, err := p.downloads("s390x"); err == nil || !strings.Contains(err.Error(), "s390x") {
			t.Errorf("downloads for s390x: got error %v", err)
		}
	}
}

func TestWheelsRejectsLines(t *testing.T) {
	for _, line := range []string{"https://example.com/a-1-py3-none-any.whl", "https://example.com/a-1-py3-none-any.whl#sha256=12"} {
		if _, err := wheels(line+"\n", "x86_64"); err == nil || !strings.Contains(err.Error(), "is not a URL with a hash") {
			t.Errorf("%s: got error %v", line, err)
		}
	}
}
