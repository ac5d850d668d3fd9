package mcp

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
)

var sandboxA = sandbox.Name{Namespace: "default", Name: "a"}

// file returns the content of a file of the sandbox a.
func (s *site) file(t testing.TB, path string) string {
	t.Helper()
	_, data, err := s.sandboxes.Sandboxes.ReadFile(t.Context(), sandboxA, sandbox.Path{Path: path}, 0, -1)
	if err != nil {
		t.Fatal(err)
	}
	content, err := io.ReadAll(data)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

// putFile writes a file of the sandbox a.
func (s *site) putFile(t testing.TB, path, content string) {
	t.Helper()
	if _, _, err := s.sandboxes.Sandboxes.WriteFile(t.Context(), sandboxA, sandbox.Path{Path: path}, sandbox.WriteOptions{}, strings.NewReader(content)); err != nil {
		t.Fatal(err)
	}
}

// readLink reads a resource and returns its text.
func (s *site) readLink(t testing.TB, uri string, changes ...func(*http.Request)) string {
	t.Helper()
	w := s.post(fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"resources/read","params":{"uri":%q}}`, uri), changes...)
	var response struct{ Result *sdk.ReadResourceResult }
	if err := json.Unmarshal(w.Body.Bytes(), &response); err != nil || response.Result == nil {
		t.Fatalf("%s: %d %s", uri, w.Code, w.Body)
	}
	return response.Result.Contents[0].Text
}

// link returns the URI of the resource link in a result, or "".
func link(res *sdk.CallToolResult) string {
	for _, c := range res.Content {
		if c, ok := c.(*sdk.ResourceLink); ok {
			return c.URI
		}
	}
	return ""
}

// A long output has a link to a file of the sandbox with all of it, whether the run succeeds or not.
func TestRestOfOutput(t *testing.T) {
	s := newSite(t)
	for tool, c := range map[string]struct {
		arguments, want string
		failed          bool
	}{
		"sandbox_run_code":    {`"language":"python","code":"300 KiB of \"é\\n\""`, strings.Repeat("é\n", 64<<10/3*4) + strings.Repeat("é\n", 44<<10/3), false},
		"sandbox_run_command": {`"command":"60 KiB of \"x\""`, strings.Repeat("x", 60<<10), false},
	} {
		res := s.callTool(t, tool, `{"sandbox":"a","user":"guest",`+c.arguments+`}`)
		uri := link(res)
		path, ok := strings.CutPrefix(uri, "msb://sandboxes/default/a/files")
		all := contents(res)
		if !ok || res.IsError || len(all) != 2 || !strings.Contains(all[0], "all of it is in the file "+path+" of the sandbox") || all[1] != fmt.Sprintf("[link %s %d]", uri, len(c.want)) {
			t.Fatalf("%s: %d contents with the link %q: %.200q", tool, len(all), uri, all)
		}
		if got := s.file(t, path); got != c.want {
			t.Errorf("%s: the file has %d bytes, want %d: %.50q", tool, len(got), len(c.want), got)
		}
		if got := s.readLink(t, uri); got != c.want {
			t.Errorf("%s: the resource has %d bytes, want %d", tool, len(got), len(c.want))
		}
		info, err := s.sandboxes.StatFile(t.Context(), sandboxA, sandbox.Path{Path: path}, false)
		if err != nil || info.Mode != 0o600 || info.User != "guest" {
			t.Errorf("%s: the file is %+v, %v; want it to belong to guest alone", tool, info, err)
		}
	}
	// A run that prints more than msbd accepts.
	res := s.callTool(t, "sandbox_run_command", `{"sandbox":"a","command":"20000 KiB of \"x\""}`)
	if uri := link(res); !res.IsError || uri == "" || !strings.Contains(contents(res)[0], "16 MiB") {
		t.Errorf("%.100q", contents(res))
	} else if path := strings.TrimPrefix(uri, "msb://sandboxes/default/a/files"); len(s.file(t, path)) != 16<<20 {
		t.Errorf("the file has %d bytes", len(s.file(t, path)))
	}
	// A short output has no file.
	if res := s.callTool(t, "sandbox_run_command", `{"sandbox":"a","command":"40 KiB of \"x\""}`); len(res.Content) != 1 {
		t.Errorf("%.100q", contents(res))
	}
}

// Without a file, the model gets the beginning and the end, and advice.
func TestRestOfOutputIsNotKept(t *testing.T) {
	s := newSite(t)
	noFiles, _ := s.issue(t, keys.IssueRequest{Scopes: []keys.Scope{keys.ScopeExec}})
	const run = `{"sandbox":"a","command":"60 KiB of \"x\""}`
	check := func(name string, res *sdk.CallToolResult) {
		t.Helper()
		if all := contents(res); res.IsError || len(all) != 1 || !strings.Contains(all[0], "to read them, write the output to a file") {
			t.Errorf("%s: %d contents, %.100q", name, len(all), all)
		}
	}
	check("a key that may not use files", s.callTool(t, "sandbox_run_command", run, header("Authorization", noFiles)))
	// In a sandbox without files, as in one whose disk is full.
	check("a sandbox that refuses the file", s.callTool(t, "sandbox_run_command", strings.Replace(run, `"a"`, `"broken"`, 1)))

	// Clients of the first revision do not know links, but the text names the file.
	res := s.callTool(t, "sandbox_run_command", run, header("Mcp-Protocol-Version", "2025-03-26"))
	if all := contents(res); len(all) != 1 || !strings.Contains(all[0], "all of it is in the file /var/lib/msb/output/") {
		t.Errorf("revision 2025-03-26: %.100q", all)
	}
}

// The sandbox keeps only the newest outputs, and nothing else in the directory is removed.
func TestOldOutputsAreRemoved(t *testing.T) {
	s := newSite(t)
	const directory = "/var/lib/msb/output/"
	s.putFile(t, directory+"my.txt", "mine")
	for i := range 9 {
		s.putFile(t, fmt.Sprintf("%s2026010%dT000000-abcdefgh.txt", directory, i), "old")
	}
	s.callTool(t, "sandbox_run_command", `{"sandbox":"a","command":"60 KiB of \"x\""}`)
	var names []string
	err := s.sandboxes.ListFiles(t.Context(), sandboxA, sandbox.Path{Path: directory}, 1, func(f sandbox.FileInfo) error {
		names = append(names, strings.TrimPrefix(f.Path, directory))
		return nil
	})
	if err != nil || len(names) != 9 || names[0] != "20260102T000000-abcdefgh.txt" || names[8] != "my.txt" {
		t.Errorf("%v, %v", names, err)
	}
}

// Values are text in the output, and images are images. An exception is text.
func TestResultsOfCode(t *testing.T) {
	s := newSite(t)
	png := base64.StdEncoding.EncodeToString([]byte("a picture"))
	run := func(code string) *sdk.CallToolResult {
		t.Helper()
		text, err := json.Marshal(code)
		if err != nil {
			t.Fatal(err)
		}
		return s.callTool(t, "sandbox_run_code", `{"sandbox":"a","language":"python","results":false,"code":`+string(text)+`}`)
	}
	for displays, want := range map[string][]string{
		`{"data":{"text/html":"<b>","text/plain":"42"},"is_main":true}`:                                      {"before\n42"},
		`{"data":{"image/png":"` + png + `","text/plain":"<Figure>"}},{"data":{"image/jpeg":"` + png + `"}}`: {"before\n<Figure>", "[image/png a picture]", "[image/jpeg a picture]"},
		`{"data":{"application/json":{"a":[1]}}}`:                                                            {"before\n" + `{"a":[1]}`},
		`{"data":{"application/pdf":"AAAA"}}`:                                                                {"before\n[a value that has no text: application/pdf]"},
		`{"data":{"image/png":7}},{"data":{"image/png":"?"}}`:                                                {"before", "(the code has shown an image/png that is not base64)", "(the code has shown an image/png that is not base64)"},
		`{"data":{"image/png":"HUGE"}}`:                                                                      {"before\n[an image of 2048 KiB is left out, because a result has at most 8 images of together 4 MiB, and each has at most 2 MiB]"},
		strings.TrimSuffix(strings.Repeat(`{"data":{"text/plain":"x","image/png":"`+png+`"}},`, 10), ","):    nil,
		strings.TrimSuffix(strings.Repeat(`{"data":{"text/plain":"x","image/png":"LARGE"}},`, 4), ","):       nil,
	} {
		res := run("show [" + displays + "]")
		got := contents(res)
		switch {
		case want != nil:
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("%.100s: (-want +got):\n%.1000s", displays, diff)
			}
		case len(got) < 2 || len(got) > 9 || strings.Count(got[0], "is left out")+len(got)-1 != strings.Count(displays, "image/png"):
			t.Errorf("%.100s: %d images, text %.1000q", displays, len(got)-1, got[0])
		}
		if res.IsError || res.StructuredContent != nil {
			t.Errorf("%.100s: %+v", displays, res.Meta)
		}
	}
	if got := contents(run("fail Traceback: x\n")); !slices.Equal(got, []string{"Traceback: x\n(the code failed)"}) && !slices.Equal(got, []string{"Traceback: x"}) {
		t.Errorf("an exception: %q", got)
	}
	// A long value is cut like other output.
	res := run(`show [{"data":{"text/plain":"` + strings.Repeat("v", 100_000) + `"}}]`)
	if all := contents(res); len(all) != 2 || len(all[0]) > 51_000 || link(res) == "" {
		t.Errorf("a long value: %d contents, text of %d bytes", len(all), len(all[0]))
	}
}

// Code also runs in a sandbox that an earlier version of msbd has started, without images.
func TestCodeInAnOldSandbox(t *testing.T) {
	s := newSite(t)
	if res := s.callTool(t, "sandbox_run_code", `{"sandbox":"old","language":"python","code":"1+1"}`); res.IsError || text(t, res) != "ran 1+1" {
		t.Errorf("%+v", res)
	}
}

// The URI of a file stands for exactly that file, whatever its path is.
func FuzzFileURI(f *testing.F) {
	f.Add("files", "/files/a b?offset=1#%2F..")
	f.Fuzz(func(t *testing.T, name, path string) {
		path = "/" + strings.ToValidUTF8(path, "")
		if strings.Contains(name, "/") || !utf8.ValidString(name) {
			return
		}
		uri := fileURI(name, name+"-2", path)
		if p, ok := parseFileURI(uri); !ok || p.Namespace != name || p.Sandbox != name+"-2" || p.Path != path || p.Offset != 0 {
			t.Errorf("%q of %q became %s and then %+v, %v", path, name, uri, p, ok)
		}
	})
}

// A resource is a file of a sandbox that the key may read.
func TestResources(t *testing.T) {
	s := newSite(t)
	s.putFile(t, "/tmp/a file.txt", "héllo")
	s.putFile(t, "/tmp/empty", "")
	s.putFile(t, "/tmp/binary", "\x00\xff")
	s.putFile(t, "/tmp/long", strings.Repeat("x", 2<<20+1))
	s.putFile(t, "/tmp/escapes", strings.Repeat("\x01", 2<<20))
	own, _ := s.issue(t, keys.IssueRequest{Namespaces: []string{"own"}})
	noFiles, _ := s.issue(t, keys.IssueRequest{Scopes: []keys.Scope{keys.ScopeExec, keys.ScopeRead}})
	for _, revision := range Revisions {
		c, err := connect(t, s.listen(t), s.key, revision, nil)
		if err != nil {
			t.Fatal(err)
		}
		templates, err := c.ListResourceTemplates(t.Context(), nil)
		if err != nil || len(templates.ResourceTemplates) != 1 || templates.ResourceTemplates[0].URITemplate != "msb://sandboxes/{namespace}/{sandbox}/files{+path}{?offset,length}" {
			t.Errorf("%s: %+v, %v", revision, templates, err)
		}
		if list, err := c.ListResources(t.Context(), nil); err != nil || len(list.Resources) != 0 {
			t.Errorf("%s: %+v, %v", revision, list, err)
		}
		res, err := c.ReadResource(t.Context(), &sdk.ReadResourceParams{URI: "msb://sandboxes/default/a/files/tmp/a%20file.txt"})
		if err != nil || res.Contents[0].Text != "héllo" || res.Contents[0].MIMEType != "text/plain" {
			t.Errorf("%s: %+v, %v", revision, res, err)
		}
		c.Close()
	}
	const base = "msb://sandboxes/default/a/files/tmp/"
	if got := s.readLink(t, base+"a%20file.txt?offset=1&length=2"); got != "é" {
		t.Errorf("a part: %q", got)
	}
	for uri, want := range map[string]string{
		base + "binary": `"mimeType":"application/octet-stream","blob":"AP8="`, base + "empty": `"blob":""`, base + "escapes": "there is no room for the result", base + "long?length=5": `"text":"xxxxx"`,
		base + "none": `/tmp/none does not exist in the sandbox`, base + "long": "add ?offset=0\\u0026length=2097152 to the URI",
		"msb://sandboxes/default/gone/files/x": "sandbox default/gone does not exist", "msb://sandboxes/../a/files/x": "namespace",
		"msb://other/default/a/files/x": "Resource not found", "file:///etc/passwd": "Resource not found", base + "x?offset=-1": "does not have the form",
		base + "x?a=1": "does not have the form", "msb://sandboxes/default/a/x/files/y": "Resource not found",
	} {
		w := s.post(fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"resources/read","params":{"uri":%q}}`, uri))
		if body := w.Body.String(); !strings.Contains(body, want) && !strings.Contains(body, strings.ReplaceAll(want, `\u0026`, "&")) {
			t.Errorf("%s: %d %.300s, want %s", uri, w.Code, body, want)
		}
	}
	s.sandboxes.takeCalls()
	for key, code := range map[string]rpc.Code{own: rpc.CodePermissionDenied, noFiles: rpc.CodePermissionDenied} {
		w := s.post(fmt.Sprintf(`{"jsonrpc":"2.0","id":1,"method":"resources/read","params":{"uri":%q}}`, base+"long"), header("Authorization", key))
		if !bytes.Contains(w.Body.Bytes(), fmt.Appendf(nil, `"code":%d`, code)) {
			t.Errorf("%d %.200s, want %d", w.Code, w.Body, code)
		}
	}
	wantCalls(t, s)
}
