package stream_test

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"mime"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-json-experiment/json"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/sandbox"
	"github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// client sends requests to a site.
type client struct {
	t      *testing.T
	s      *servetest.Site
	addr   string
	key    string
	http   *http.Client
	dialer func(ctx context.Context, network, address string) (net.Conn, error)
}

// connect starts serving. stop stops the server, which the end of the test also does.
func connect(t *testing.T, s *servetest.Site) (c *client, stop func()) {
	t.Helper()
	addr, stop := s.Listen(t)
	t.Cleanup(stop)
	return &client{t, s, addr, s.Key, http.DefaultClient, (&net.Dialer{}).DialContext}, stop
}

// dial opens a connection.
func (c *client) dial() net.Conn {
	c.t.Helper()
	conn, err := c.dialer(c.t.Context(), "tcp", c.addr)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { conn.Close() })
	return conn
}

// filesURL returns the URL of a file.
func (c *client) filesURL(path string, params ...string) string {
	query := url.Values{"path": {path}}
	for i := 0; i < len(params); i += 2 {
		query.Set(params[i], params[i+1])
	}
	return "http://" + c.addr + "/api/v1/sandboxes/box/files?" + query.Encode()
}

func (c *client) do(method, url string, body io.Reader, headers ...string) *http.Response {
	c.t.Helper()
	r, err := http.NewRequest(method, url, body)
	if err != nil {
		c.t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+c.key)
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	res, err := c.http.Do(r)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { res.Body.Close() })
	return res
}

// read returns the body of a response, and the status.
func (c *client) read(res *http.Response) (int, string) {
	c.t.Helper()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		c.t.Error(err)
	}
	return res.StatusCode, string(text)
}

// file is the response of a PUT.
type file struct {
	Path       string    `json:"path"`
	PathBase64 string    `json:"path_base64"`
	Type       string    `json:"type"`
	Size       int64     `json:"size"`
	Mode       string    `json:"mode"`
	UID        uint32    `json:"uid"`
	GID        uint32    `json:"gid"`
	User       string    `json:"user"`
	Group      string    `json:"group"`
	ModifiedAt time.Time `json:"modified_at"`
}

// What was written is read again, whatever the name and the bytes are.
func TestFiles(t *testing.T) {
	s, d := newSite(t)
	c, _ := connect(t, s)
	binary := strings.Repeat("\x00\xff\r\n", 100_000)
	for _, name := range []string{"/a.txt", "/dir/sub/b", "/with space+plus&amp", "/line\nbreak", "/ümläut", "/bytes\xff\xfe", `/quote"\`, "/" + strings.Repeat("x", 255)} {
		for i, content := range []string{binary, "", "short"} {
			status, text := c.read(c.do("PUT", c.filesURL(name, "mode", "0640"), strings.NewReader(content)))
			var info file
			if err := json.Unmarshal([]byte(text), &info, json.RejectUnknownMembers(true)); err != nil {
				t.Fatalf("%q: %v: %s", name, err, text)
			}
			want := http.StatusOK
			if i == 0 {
				want = http.StatusCreated
			}
			path, err := base64.StdEncoding.DecodeString(info.PathBase64)
			if err != nil {
				t.Error(err)
			}
			if info.PathBase64 == "" {
				path = []byte(info.Path)
			}
			if status != want || string(path) != name || info.Type != "file" || info.Size != int64(len(content)) || info.Mode != "0640" ||
				info.UID != 1000 || info.User != "user" || time.Since(info.ModifiedAt) > time.Minute {
				t.Errorf("PUT %q: got %d %s, want %d with its description", name, status, text, want)
			}
			res := c.do("GET", c.filesURL(name), nil)
			if status, text := c.read(res); status != http.StatusOK || text != content {
				t.Errorf("GET %q: got %d with %d bytes, want 200 with %d", name, status, len(text), len(content))
			}
			_, disposition, err := mime.ParseMediaType(res.Header.Get("Content-Disposition"))
			if h := res.Header; err != nil || disposition["filename"] != strings.ToValidUTF8(filepath.Base(name), "\uFFFD") || res.ContentLength != int64(len(content)) ||
				h.Get("Content-Type") != "application/octet-stream" || h.Get("Cache-Control") != "no-store" || !strings.HasPrefix(h.Get("ETag"), `"`) ||
				h.Get("Last-Modified") == "" || h.Get("Accept-Ranges") != "bytes" || h.Get("X-Content-Type-Options") != "nosniff" {
				t.Errorf("GET %q: headers %v, error %v", name, h, err)
			}
			if res := c.do("HEAD", c.filesURL(name), nil); res.StatusCode != http.StatusOK || res.ContentLength != int64(len(content)) {
				t.Errorf("HEAD %q: got %s, length %d; want 200, %d", name, res.Status, res.ContentLength, len(content))
			}
		}
		if status, text := c.read(c.do("DELETE", c.filesURL(name), nil)); status != http.StatusNoContent || text != "" {
			t.Errorf("DELETE %q: got %d %s, want 204", name, status, text)
		}
		if status, _ := c.read(c.do("GET", c.filesURL(name), nil)); status != http.StatusNotFound {
			t.Errorf("GET %q after its end: got %d, want 404", name, status)
		}
	}
	// An offset leaves the rest of the file as it is.
	c.do("PUT", c.filesURL("/a"), strings.NewReader("0123456789"))
	if status, text := c.read(c.do("PUT", c.filesURL("/a", "offset", "3"), strings.NewReader("abc"))); status != http.StatusOK || !strings.Contains(text, `"size":10`) {
		t.Errorf("PUT with an offset: got %d %s", status, text)
	}
	if _, text := c.read(c.do("GET", c.filesURL("/a"), nil)); text != "012abc6789" {
		t.Errorf("after a PUT with an offset, the file has %q", text)
	}
	if got := d.takeCalls(); slices.ContainsFunc(got, func(call string) bool { return !strings.HasSuffix(call, " in default") }) {
		t.Errorf("calls in other namespaces: %q", got)
	}
	if !strings.Contains(s.Log.String(), "method=/api/v1/sandboxes/{name}/files namespace=default") {
		t.Error("the log does not say in which namespace the requests were made:", s.Log)
	}
}

// Ranges and conditions work as those of net/http's file server.
func TestRanges(t *testing.T) {
	s, d := newSite(t)
	c, _ := connect(t, s)
	reference := httptest.NewServer(http.FileServer(http.Dir(d.root)))
	defer reference.Close()
	modified := time.Now().Add(-time.Hour).Truncate(time.Second)
	for name, size := range map[string]int{"data": 100_000, "empty": 0, "one": 1} {
		content := bytes.Repeat([]byte("0123456789"), size/10+1)[:size]
		if err := errors.Join(os.WriteFile(filepath.Join(d.root, name), content, 0o600), os.Chtimes(filepath.Join(d.root, name), modified, modified)); err != nil {
			t.Fatal(err)
		}
	}
	date := func(d time.Duration) string { return modified.Add(d).UTC().Format(http.TimeFormat) }
	for _, name := range []string{"data", "empty", "one"} {
		for _, method := range []string{"GET", "HEAD"} {
			for _, headers := range [][]string{
				{}, {"Range", "bytes=0-"}, {"Range", "bytes=0-0"}, {"Range", "bytes=5-9"}, {"Range", "bytes=99999-"}, {"Range", "bytes=-1"},
				{"Range", "bytes=-100000"}, {"Range", "bytes=-200000"}, {"Range", "bytes=50000-60000"}, {"Range", "bytes=100000-"}, {"Range", "bytes=1-0"},
				{"Range", "bytes=0-999999"}, {"Range", "bytes=x"}, {"Range", "lines=1-2"}, {"Range", "bytes="}, {"Range", "bytes=18446744073709551616-"},
				{"If-Modified-Since", date(0)}, {"If-Modified-Since", date(-time.Second)}, {"If-Unmodified-Since", date(0)}, {"If-Unmodified-Since", date(-time.Second)},
				{"Range", "bytes=5-9", "If-Range", date(0)}, {"Range", "bytes=5-9", "If-Range", date(-time.Hour)}, {"Range", "bytes=5-9", "If-Range", `W/"x"`},
				{"If-None-Match", "*"}, {"If-Match", `"x"`}, {"If-None-Match", `"x"`},
			} {
				want, got := c.do(method, reference.URL+"/"+name, nil, headers...), c.do(method, c.filesURL("/"+name), nil, headers...)
				wantStatus, wantText := c.read(want)
				status, text := c.read(got)
				if status != wantStatus {
					t.Errorf("%s %s %q: status %d, want %d", method, name, headers, status, wantStatus)
				}
				if status >= http.StatusBadRequest {
					wantText = text
					if method == "GET" && !strings.HasPrefix(text, `{"jsonrpc":"2.0","error":{"code":-32600,"message":"the file ha`) || got.Header.Get("Content-Type") != "application/json" {
						t.Errorf("%s %s %q: got %s %s", method, name, headers, got.Header.Get("Content-Type"), text)
					}
				} else if got.ContentLength != want.ContentLength {
					t.Errorf("%s %s %q: length %d, want %d", method, name, headers, got.ContentLength, want.ContentLength)
				}
				// Only what is sent is read, because the sandbox prepares for what is requested.
				if method == "GET" && status < 300 && len(text) > 0 && d.lastReadLength() != int64(len(text)) && len(headers) > 0 && headers[0] == "Range" {
					t.Errorf("GET %s %q: %d bytes are read, want %d", name, headers, d.lastReadLength(), len(text))
				}
				if text != wantText || got.Header.Get("Content-Range") != want.Header.Get("Content-Range") {
					t.Errorf("%s %s %q: got %d bytes, range %s; want %d, %s", method, name, headers, len(text), got.Header.Get("Content-Range"), len(wantText), want.Header.Get("Content-Range"))
				}
			}
		}
	}
	tag := c.do("HEAD", c.filesURL("/data"), nil).Header.Get("ETag")
	if res := c.do("GET", c.filesURL("/data"), nil, "If-Match", tag); res.StatusCode != http.StatusOK {
		t.Errorf("GET with If-Match of its own tag: got %s, want 200", res.Status)
	}
	if res := c.do("GET", c.filesURL("/data"), nil, "If-None-Match", tag); res.StatusCode != http.StatusNotModified {
		t.Errorf("GET of the same version: %s, want 304", res.Status)
	}
	// Several ranges are answered with the whole file.
	if status, text := c.read(c.do("GET", c.filesURL("/data"), nil, "Range", "bytes=0-1,5-6")); status != http.StatusOK || len(text) != 100_000 {
		t.Errorf("GET of two ranges: got %d with %d bytes, want the file", status, len(text))
	}
	if err := os.WriteFile(filepath.Join(d.root, "data"), []byte("new"), 0o600); err != nil {
		t.Fatal(err)
	}
	if status, text := c.read(c.do("GET", c.filesURL("/data"), nil, "If-None-Match", tag)); status != http.StatusOK || text != "new" {
		t.Errorf("GET of another version: %d %q, want the new file", status, text)
	}
}

func TestFileErrors(t *testing.T) {
	s, d := newSite(t)
	c, _ := connect(t, s)
	if err := errors.Join(os.Mkdir(filepath.Join(d.root, "dir"), 0o755), os.WriteFile(filepath.Join(d.root, "dir", "file"), nil, 0o600),
		os.Symlink("dir", filepath.Join(d.root, "link")), os.Symlink("nowhere", filepath.Join(d.root, "dangling"))); err != nil {
		t.Fatal(err)
	}
	base := "http://" + c.addr + "/api/v1/sandboxes/"
	for name, test := range map[string]struct {
		method, url string
		headers     []string
		status      int
		code        rpc.Code
		message     string
	}{
		"missing file":         {"GET", c.filesURL("/no"), nil, 404, rpc.CodeNotFound, `"/no" does not exist`},
		"missing directory":    {"DELETE", c.filesURL("/no/no"), nil, 404, rpc.CodeNotFound, "does not exist"},
		"dangling link":        {"GET", c.filesURL("/dangling"), nil, 404, rpc.CodeNotFound, "does not exist"},
		"missing tree":         {"GET", c.filesURL("/no"), []string{"Accept", "application/x-tar"}, 404, rpc.CodeNotFound, "does not exist"},
		"missing sandbox":      {"GET", base + "other/files?path=/", nil, 404, rpc.CodeNotFound, "sandbox default/other does not exist"},
		"no path":              {"GET", base + "box/files", nil, 400, rpc.CodeInvalidParams, "path is missing"},
		"empty path":           {"PUT", base + "box/files?path=", nil, 400, rpc.CodeInvalidParams, "path is missing"},
		"bad name":             {"GET", base + "a%2Fb/files?path=/", nil, 400, rpc.CodeInvalidParams, "sandbox name"},
		"bad namespace":        {"GET", c.filesURL("/a", "namespace", "a b"), nil, 400, rpc.CodeInvalidParams, "namespace"},
		"empty namespace":      {"GET", c.filesURL("/a", "namespace", ""), nil, 400, rpc.CodeInvalidParams, "namespace"},
		"all namespaces":       {"GET", c.filesURL("/a", "namespace", "*"), nil, 400, rpc.CodeInvalidParams, "namespace"},
		"bad query":            {"GET", base + "box/files?path=%zz", nil, 400, rpc.CodeInvalidParams, "encode special characters"},
		"path twice":           {"GET", base + "box/files?path=/a&path=/b", nil, 400, rpc.CodeInvalidParams, "path only once"},
		"unknown parameter":    {"GET", c.filesURL("/a", "recursive", "true"), nil, 400, rpc.CodeInvalidParams, `"recursive" is not a parameter`},
		"mode of a GET":        {"GET", c.filesURL("/a", "mode", "0644"), nil, 400, rpc.CodeInvalidParams, `"mode"`},
		"directory":            {"GET", c.filesURL("/dir"), nil, 409, rpc.CodeConflict, `"/dir" is a directory; send the header Accept: application/x-tar`},
		"link to a directory":  {"GET", c.filesURL("/link"), nil, 409, rpc.CodeConflict, "Accept: application/x-tar"},
		"range of a directory": {"GET", c.filesURL("/dir"), []string{"Range", "bytes=1-"}, 409, rpc.CodeConflict, "Accept: application/x-tar"},
		"PUT to a directory":   {"PUT", c.filesURL("/dir"), nil, 409, rpc.CodeConflict, "is a directory"},
		"full directory":       {"DELETE", c.filesURL("/dir"), nil, 409, rpc.CodeConflict, "not empty"},
		"bad flag":             {"DELETE", c.filesURL("/dir", "recursive", "yes"), nil, 400, rpc.CodeInvalidParams, "recursive must be true or false"},
		"bad mode":             {"PUT", c.filesURL("/a", "mode", "rw"), nil, 400, rpc.CodeInvalidParams, `mode "rw": give the permissions in octal`},
		"decimal mode":         {"PUT", c.filesURL("/a", "mode", "0689"), nil, 400, rpc.CodeInvalidParams, "octal"},
		"mode too large":       {"PUT", c.filesURL("/a", "mode", "10000"), nil, 400, rpc.CodeInvalidParams, "octal"},
		"bad offset":           {"PUT", c.filesURL("/a", "offset", "-1"), nil, 400, rpc.CodeInvalidParams, `offset "-1"`},
		"unknown user":         {"PUT", c.filesURL("/a", "user", "nobody"), nil, 400, rpc.CodeInvalidParams, `user "nobody" does not exist`},
		"compressed":           {"PUT", c.filesURL("/a"), []string{"Content-Encoding", "gzip"}, 415, rpc.CodeInvalidRequest, "Content-Encoding"},
		"only if new":          {"PUT", c.filesURL("/a"), []string{"If-None-Match", "*"}, 400, rpc.CodeInvalidRequest, "If-None-Match"},
		"only if unchanged":    {"DELETE", c.filesURL("/a"), []string{"If-Match", `"x"`}, 400, rpc.CodeInvalidRequest, "If-Match"},
		"part":                 {"PUT", c.filesURL("/a"), []string{"Content-Range", "bytes 0-1/2"}, 400, rpc.CodeInvalidRequest, "parameter offset"},
		"mode of an archive":   {"PUT", c.filesURL("/a", "mode", "0644"), []string{"Content-Type", "application/x-tar"}, 400, rpc.CodeInvalidParams, `"mode"`},
		"no archive":           {"PUT", c.filesURL("/a"), []string{"Content-Type", "application/x-tar"}, 400, rpc.CodeInvalidParams, "archive is not valid"},
		"owners of a file":     {"PUT", c.filesURL("/a", "keep_owners", "true"), nil, 400, rpc.CodeInvalidParams, `"keep_owners"`},
		"bad owners":           {"PUT", c.filesURL("/a", "keep_owners", "1"), []string{"Content-Type", "application/x-tar"}, 400, rpc.CodeInvalidParams, "keep_owners must be"},
		"POST":                 {"POST", c.filesURL("/a"), nil, 405, rpc.CodeInvalidRequest, "DELETE, GET, HEAD, PUT"},
	} {
		var body io.Reader
		if test.method == "PUT" {
			body = strings.NewReader("some text")
		}
		res := c.do(test.method, test.url, body, test.headers...)
		status, text := c.read(res)
		var response rpc.Response
		if err := json.Unmarshal([]byte(text), &response); err != nil || response.Error == nil {
			t.Errorf("%s: got %d %s, error %v", name, status, text, err)
			continue
		}
		if status != test.status || response.Error.Code != test.code || !strings.Contains(response.Error.Message, test.message) || res.Header.Get("Content-Type") != "application/json" {
			t.Errorf("%s: got %d %s, want %d, %d %s", name, status, text, test.status, test.code, test.message)
		}
	}
	if status, _ := c.read(c.do("DELETE", c.filesURL("/dir", "recursive", "true"), nil)); status != http.StatusNoContent {
		t.Errorf("DELETE of a full directory: got %d, want 204", status)
	}
	if log := s.Log.String(); strings.Contains(log, "/dir") || strings.Contains(log, "rw") {
		t.Error("the log contains text of the requests:", log)
	}
}

// A directory is read and written as a tar archive.
// The sandbox learns the length of an upload that has one.
func TestUploadAnnouncesItsLength(t *testing.T) {
	s, d := newSite(t)
	c, _ := connect(t, s)
	for body, want := range map[io.Reader]int64{strings.NewReader("text"): 4, io.MultiReader(strings.NewReader("text")): 0, http.NoBody: 0} {
		res := c.do("PUT", c.filesURL("/a"), body)
		d.mu.Lock()
		got := d.announced
		d.mu.Unlock()
		if res.StatusCode >= 300 || got != want {
			t.Errorf("%T: %s, announced %d bytes, want %d", body, res.Status, got, want)
		}
	}
}

// A request that forgets its body does not empty the file. net/http sends a length of 0 for an empty one.
func TestUploadWithoutLength(t *testing.T) {
	s, _ := newSite(t)
	c, _ := connect(t, s)
	c.do("PUT", c.filesURL("/a"), strings.NewReader("precious"))
	conn := c.dial()
	u, _ := url.Parse(c.filesURL("/a"))
	fmt.Fprintf(conn, "PUT %s HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer %s\r\n\r\n", u.RequestURI(), s.Key)
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || res.StatusCode != http.StatusLengthRequired {
		t.Errorf("got %v, error %v, want 411", res, err)
	}
	if _, text := c.read(c.do("GET", c.filesURL("/a"), nil)); text != "precious" {
		t.Errorf("the file has %q", text)
	}
	if res := c.do("PUT", c.filesURL("/a"), http.NoBody); res.StatusCode != http.StatusOK {
		t.Errorf("an empty file: got %s", res.Status)
	}
}

func TestTrees(t *testing.T) {
	s, d := newSite(t)
	c, _ := connect(t, s)
	var archive bytes.Buffer
	out := tar.NewWriter(&archive)
	files := map[string]string{"a": "first", "sub/b": strings.Repeat("second", 10_000), "sub/deep/c": ""}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		if err := out.WriteHeader(&tar.Header{Name: name, Size: int64(len(files[name])), Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		io.WriteString(out, files[name])
	}
	out.Close()
	for _, keepOwners := range []string{"", "true", "false"} {
		params := []string{"keep_owners", keepOwners}
		if keepOwners == "" {
			params = nil
		}
		d.takeCalls()
		status, text := c.read(c.do("PUT", c.filesURL("/tree", params...), bytes.NewReader(archive.Bytes()), "Content-Type", "application/x-tar; charset=binary"))
		if want := fmt.Sprintf("write tree %t in default", keepOwners == "true"); status != http.StatusOK || text != `{"entries":3}` || !slices.Equal(d.takeCalls(), []string{want}) {
			t.Errorf("PUT of an archive: got %d %s, want 200 with 3 entries, and %q", status, text, want)
		}
	}
	for _, accept := range []string{"application/x-tar", "text/html, application/x-tar;q=0.5", "Application/X-Tar"} {
		res := c.do("GET", c.filesURL("/tree"), nil, "Accept", accept)
		if res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != "application/x-tar" || res.ContentLength != -1 ||
			res.Header.Get("Content-Disposition") != "attachment; filename=tree.tar" {
			t.Fatalf("GET of a tree: %s %v", res.Status, res.Header)
		}
		got := map[string]string{}
		for in := tar.NewReader(res.Body); ; {
			header, err := in.Next()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			text, err := io.ReadAll(in)
			if err != nil {
				t.Fatal(err)
			}
			if header.Typeflag == tar.TypeReg {
				got[header.Name] = string(text)
			}
		}
		if !maps.Equal(got, files) {
			t.Errorf("the tree has the files %q", slices.Sorted(maps.Keys(got)))
		}
	}
	for _, accept := range []string{"*/*", "application/*", "application/x-tar;q=0", "application/json", "x"} {
		if res := c.do("GET", c.filesURL("/tree"), nil, "Accept", accept); res.StatusCode != http.StatusConflict {
			t.Errorf("GET of a tree with Accept: %s: %s, want 409", accept, res.Status)
		}
	}
	if res := c.do("HEAD", c.filesURL("/tree"), nil, "Accept", "application/x-tar"); res.StatusCode != http.StatusOK {
		t.Errorf("HEAD of a tree: %s", res.Status)
	}
}

// An upload that does not arrive completely leaves the file as it is.
func TestInterruptedUploads(t *testing.T) {
	s, d := newSite(t)
	c, stop := connect(t, s)
	c.do("PUT", c.filesURL("/a"), strings.NewReader("old"))
	for name, request := range map[string]string{
		"too short":                     "Content-Length: 100\r\n\r\nnew",
		"chunked":                       "Transfer-Encoding: chunked\r\n\r\n3\r\nnew\r\n",
		"invalid chunk":                 "Transfer-Encoding: chunked\r\n\r\n3\r\nnew\r\nzz\r\n",
		"the body never begins":         "Content-Length: 100\r\n\r\n",
		"archive":                       "Content-Type: application/x-tar\r\nContent-Length: 100\r\n\r\nnew",
		"too short, waits for continue": "Expect: 100-continue\r\nContent-Length: 100\r\n\r\nnew",
	} {
		conn := c.dial()
		fmt.Fprintf(conn, "PUT /api/v1/sandboxes/box/files?path=/a HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\n%s", c.key, request)
		conn.(*net.TCPConn).CloseWrite()
		in := bufio.NewReader(conn)
		res, err := http.ReadResponse(in, nil)
		if err == nil && res.StatusCode == http.StatusContinue {
			res, err = http.ReadResponse(in, nil)
		}
		if err != nil || res.StatusCode != http.StatusBadRequest {
			t.Errorf("%s: response is %v, error %v; want a 400", name, res, err)
		} else if text, err := io.ReadAll(res.Body); err != nil || !strings.Contains(string(text), "could not be read completely") {
			t.Errorf("%s: response is %s, error %v", name, text, err)
		}
		conn.Close()
	}
	stop() // waits for the requests
	if content, err := os.ReadFile(filepath.Join(d.root, "a")); err != nil || string(content) != "old" {
		t.Errorf("the file has %q, error %v; want the old content", content, err)
	}
	if entries, err := os.ReadDir(d.root); err != nil || len(entries) != 1 {
		t.Errorf("the directory has %v, error %v; want only the file", entries, err)
	}
}

// readerFunc is a reader without an end.
type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// A sandbox that does not send what it announced does not break the server. The client notices.
func TestHostileFiles(t *testing.T) {
	s, d := newSite(t)
	c, stop := connect(t, s)
	now := time.Now()
	zeros := readerFunc(func(p []byte) (int, error) { clear(p); return len(p), nil })
	fails := errors.New("it failed")
	for name, test := range map[string]struct {
		info  sandbox.FileInfo
		data  io.Reader
		rng   string
		later *sandbox.FileInfo // from the second open
		fails bool              // before the response begins
	}{
		"negative size":      {info: sandbox.FileInfo{Size: -1}, data: zeros, fails: true},
		"smallest size":      {info: sandbox.FileInfo{Size: math.MinInt64}, data: zeros, fails: true},
		"fewer bytes":        {info: sandbox.FileInfo{Size: 1 << 20}, data: io.LimitReader(zeros, 1<<20-1)},
		"no bytes":           {info: sandbox.FileInfo{Size: 1}, data: strings.NewReader("")},
		"one byte more":      {info: sandbox.FileInfo{Size: 1 << 20}, data: io.LimitReader(zeros, 1<<20+1)},
		"no end":             {info: sandbox.FileInfo{Size: 10}, data: zeros},
		"huge size":          {info: sandbox.FileInfo{Size: math.MaxInt64}, data: strings.NewReader("few")},
		"error in between":   {info: sandbox.FileInfo{Size: 10}, data: io.MultiReader(strings.NewReader("few"), readerFunc(func([]byte) (int, error) { return 0, fails }))},
		"error at the end":   {info: sandbox.FileInfo{Size: 3}, data: io.MultiReader(strings.NewReader("few"), readerFunc(func([]byte) (int, error) { return 0, fails }))},
		"another size":       {info: sandbox.FileInfo{Size: 10}, data: zeros, rng: "bytes=1-2", later: &sandbox.FileInfo{Size: 11, ModifiedAt: now}},
		"another version":    {info: sandbox.FileInfo{Size: 10}, data: zeros, rng: "bytes=1-2", later: &sandbox.FileInfo{Size: 10, ModifiedAt: now.Add(1)}},
		"range, fewer bytes": {info: sandbox.FileInfo{Size: 10}, data: strings.NewReader("few"), rng: "bytes=5-"},
		"range, more bytes":  {info: sandbox.FileInfo{Size: 10}, data: zeros, rng: "bytes=5-"},
	} {
		opened := 0
		d.set(hooks{readFile: func(context.Context, int64, int64) (sandbox.FileInfo, io.ReadCloser, error) {
			opened++
			info := test.info
			info.ModifiedAt = now
			if opened > 1 && test.later != nil {
				info = *test.later
			}
			return info, io.NopCloser(test.data), nil
		}})
		res := c.do("GET", c.filesURL("/a"), nil, "Range", test.rng)
		text, err := io.ReadAll(res.Body)
		if test.fails && (err != nil || res.StatusCode != http.StatusBadGateway || !strings.Contains(string(text), `"code":-32010`)) {
			t.Errorf("%s: got %s %s, error %v; want a 502", name, res.Status, text, err)
		}
		if !test.fails && (err == nil || res.StatusCode >= 300) {
			t.Errorf("%s: got %s with %d bytes, error %v; want an incomplete response", name, res.Status, len(text), err)
		}
	}
	for name, at := range map[string]time.Time{"too late": time.Unix(1<<55, 0), "too early": time.Unix(-1<<55, 0), "zero": {}} {
		d.set(hooks{readFile: func(context.Context, int64, int64) (sandbox.FileInfo, io.ReadCloser, error) {
			return sandbox.FileInfo{Size: 3, ModifiedAt: at}, io.NopCloser(strings.NewReader("few")), nil
		}})
		res := c.do("GET", c.filesURL("/a"), nil)
		if status, text := c.read(res); status != http.StatusOK || text != "few" || res.Header.Get("Last-Modified") != "" {
			t.Errorf("%s: got %d %q, headers %v", name, status, text, res.Header)
		}
	}
	stop()
	if strings.Contains(s.Log.String(), "panic") {
		t.Error("the log has a panic:", s.Log)
	}
}

// Nothing that is transferred is held in memory.
func TestTransfersHoldNoMemory(t *testing.T) {
	const size = 256 << 20
	s, d := newSite(t)
	c, _ := connect(t, s)
	var peak atomic.Uint64
	measure := func() {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		peak.Store(max(peak.Load(), m.HeapAlloc))
	}
	every := func(n int64) func(int) { // calls measure whenever n more bytes were transferred
		var seen, next int64
		return func(bytes int) {
			if seen += int64(bytes); seen >= next {
				next += n
				measure()
			}
		}
	}
	d.set(hooks{readFile: func(context.Context, int64, int64) (sandbox.FileInfo, io.ReadCloser, error) {
		count := every(16 << 20)
		return sandbox.FileInfo{Size: size, ModifiedAt: time.Now()}, io.NopCloser(io.LimitReader(readerFunc(func(p []byte) (int, error) {
			count(len(p))
			return len(p), nil
		}), size)), nil
	}})
	runtime.GC()
	var before runtime.MemStats
	runtime.ReadMemStats(&before)
	results := make(chan error)
	go func() {
		res := c.do("GET", c.filesURL("/zeros"), nil)
		n, err := io.Copy(io.Discard, res.Body)
		if n != size && err == nil {
			err = fmt.Errorf("read %d bytes", n)
		}
		results <- err
	}()
	go func() {
		count := every(16 << 20)
		status, text := c.read(c.do("PUT", c.filesURL("/sink"), io.LimitReader(readerFunc(func(p []byte) (int, error) {
			count(len(p))
			return len(p), nil
		}), size)))
		if status != http.StatusCreated || !strings.Contains(text, fmt.Sprintf(`"size":%d,`, size)) {
			results <- fmt.Errorf("got %d %s", status, text)
			return
		}
		results <- nil
	}()
	for range 2 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
	if held := int64(peak.Load()) - int64(before.HeapAlloc); held > 8<<20 {
		t.Errorf("%d MiB were in memory during the transfers", held>>20)
	}
}

// When the key is revoked or the server stops, transfers end, whatever their client and the sandbox do.
func TestTransfersEnd(t *testing.T) {
	for _, end := range []string{"revoked", "stopped"} {
		t.Run(end, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s, d := newSite(t)
				c, stop := connectMemory(t, s)
				key, id := s.IssueNamed(t, keys.IssueRequest{})
				c.key = key
				d.set(hooks{readFile: func(ctx context.Context, _, _ int64) (sandbox.FileInfo, io.ReadCloser, error) {
					return sandbox.FileInfo{Size: 1 << 40, ModifiedAt: time.Now()}, io.NopCloser(readerFunc(func(p []byte) (int, error) { return len(p), nil })), nil
				}})
				download := c.do("GET", c.filesURL("/a"), nil)
				if _, err := io.CopyN(io.Discard, download.Body, 1<<20); err != nil {
					t.Fatal(err)
				}
				upload := c.dial()
				// The server asks for the body once it reads it.
				fmt.Fprintf(upload, "PUT /api/v1/sandboxes/box/files?path=/b HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nExpect: 100-continue\r\nContent-Length: 100\r\n\r\n", key)
				in := bufio.NewReader(upload)
				if res, err := http.ReadResponse(in, nil); err != nil || res.StatusCode != http.StatusContinue {
					t.Fatal(res, err)
				}
				began := time.Now()
				status := http.StatusUnauthorized
				if end == "stopped" {
					status = http.StatusServiceUnavailable
					go stop()
				} else if _, err := s.Keys.Revoke(t.Context(), id, 0); err != nil {
					t.Fatal(err)
				}
				if res, err := http.ReadResponse(in, nil); err != nil || res.StatusCode != status {
					t.Errorf("upload: response is %v, error %v; want status %d", res, err, status)
				}
				if n, err := io.Copy(io.Discard, download.Body); err == nil {
					t.Errorf("download: it ended after %d more bytes without an error", n)
				}
				stop()
				// A stop waits for requests, and then cancels them.
				if took := time.Since(began); end == "revoked" && took > time.Second || took > 10*time.Second {
					t.Errorf("the transfers took %s to end", took)
				}
				if entries, err := os.ReadDir(d.root); err != nil || len(entries) != 0 {
					t.Errorf("the directory has %v, error %v; want nothing", entries, err)
				}
			})
		})
	}
}

// An upload gets its response although it was not read: the disk of the sandbox is full after some bytes.
func TestUploadIsRefusedEarly(t *testing.T) {
	s, d := newSite(t)
	d.set(hooks{full: true})
	c, _ := connect(t, s)
	conn := c.dial()
	fmt.Fprintf(conn, "PUT /api/v1/sandboxes/box/files?path=/b HTTP/1.1\r\nHost: x\r\nAuthorization: %s\r\nContent-Length: %d\r\n\r\n%s", c.key, 1<<40, strings.Repeat("x", 1<<16))
	res, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || res.StatusCode != http.StatusTooManyRequests {
		t.Errorf("response is %v, error %v; want status 429", res, err)
	}
}
