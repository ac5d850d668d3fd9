package rpc_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/jsonschema-go/jsonschema"

	"github.com/msbd/msbd/api/rpc"
	serverpc "github.com/msbd/msbd/daemon/internal/serve/rpc"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
	. "github.com/msbd/msbd/daemon/internal/serve/servetest"
)

// docs/api.md is written by hand and must agree with the table of methods and with rpc.Codes.
func TestAPIDocsAreComplete(t *testing.T) {
	data, err := os.ReadFile("../../../../docs/api.md")
	if err != nil {
		t.Fatal(err)
	}
	doc := string(data)
	for _, m := range New(t).Service.Table() {
		_, section, found := strings.Cut(doc, "\n## "+m.Name+"\n")
		if !found {
			t.Errorf("docs/api.md has no section for %s", m.Name)
			continue
		}
		section, _, _ = strings.Cut(section, "\n## ")
		for _, row := range paramRows(m.Schema, "") {
			if !strings.Contains(section, row) {
				t.Errorf("%s: docs/api.md has no row that starts with%s", m.Name, row)
			}
		}
		if got, want := strings.Count(section, "\n| `"), len(paramRows(m.Schema, "")); got != want {
			t.Errorf("%s: docs/api.md has %d rows of params, want %d", m.Name, got, want)
		}
		if scope := fmt.Sprintf("| `%s` |", m.Scope); !strings.Contains(doc, scope) {
			t.Errorf("docs/api.md does not describe scope %s", m.Scope)
		}
	}
	for _, c := range rpc.Codes {
		statuses := strings.Trim(strings.Join(strings.Fields(fmt.Sprint(c.Status)), ", "), "[]")
		if row := fmt.Sprintf("\n| %s | %d | %s | %s |\n", statuses, c.Code, c.Meaning, c.Remedy); !strings.Contains(doc, row) {
			t.Errorf("docs/api.md lacks this row:%s", row)
		}
	}
}

// paramRows returns the start of each row that the table of params must have.
func paramRows(s serverpc.Schema, prefix string) (rows []string) {
	for name, member := range s.Properties {
		unsupported := prefix != "" && slices.Contains(rpc.UnsupportedConfig, name)
		if unsupported {
			continue // one row names them all
		}
		kind := member.Type
		if or, ok := kind.([]any); ok {
			kind = or[0]
		}
		if kind == "array" {
			kind = fmt.Sprintf("array of %vs", member.Items.Type)
		}
		row := fmt.Sprintf("\n| `%s%s` | %s | ", prefix, name, kind)
		if slices.Contains(s.Required, name) {
			row += "required"
		}
		rows = append(rows, row)
		rows = append(rows, paramRows(member, prefix+name+".")...)
	}
	return rows
}

// The server refuses exactly the members of config that rpc.UnsupportedConfig has.
func TestUnsupportedConfig(t *testing.T) {
	s := New(t)
	params, _ := s.Service.Schemas(rpc.MethodSandboxStart)
	var schema jsonschema.Schema
	if err := json.Unmarshal(params, &schema); err != nil {
		t.Fatal(err)
	}
	values := map[string]string{"string": `"/x"`, "integer": `1`, "array": `["X=1"]`, "object": `{"x":"1"}`}
	for name, member := range schema.Properties["config"].Properties {
		w := s.Post(Request("sandbox.start", fmt.Sprintf(`{"sandbox":"with-%s","config":{%q:%s}}`, name, name, values[member.Types[0]])))
		refused := w.Code == http.StatusBadRequest && strings.Contains(w.Body.String(), "not supported yet")
		if want := slices.Contains(rpc.UnsupportedConfig, name); refused != want || !want && w.Code != http.StatusOK {
			t.Errorf("config.%s: got %d %s, refused: %t, want %t", name, w.Code, w.Body, refused, want)
		}
	}
}

func TestEveryCodeIsDescribed(t *testing.T) {
	described := map[rpc.Code]bool{}
	for _, c := range rpc.Codes {
		described[c.Code] = true
		if got := rpcerr.HTTPStatus(c.Code); got != c.Status[0] {
			t.Errorf("code %d is sent with HTTP status %d, but rpc.Codes says %d", c.Code, got, c.Status[0])
		}
	}
	for _, code := range []rpc.Code{
		rpc.CodeParse, rpc.CodeInvalidRequest, rpc.CodeMethodNotFound, rpc.CodeInvalidParams, rpc.CodeInternal, rpc.CodeUnauthenticated,
		rpc.CodeNotFound, rpc.CodePermissionDenied, rpc.CodeConflict, rpc.CodeExhausted, rpc.CodeRunTimeout, rpc.CodeCommandNotFound,
		rpc.CodeCommandNotExecutable, rpc.CodeRunFailed, rpc.CodeUnavailable,
	} {
		if !described[code] {
			t.Errorf("rpc.Codes does not describe code %d", code)
		}
	}
}

// schemas returns the params schema of each method, as a client gets it.
func schemas(t *testing.T, s *Site) map[string]*jsonschema.Resolved {
	t.Helper()
	resolved := map[string]*jsonschema.Resolved{}
	for _, m := range s.Service.Table() {
		params, _ := s.Service.Schemas(m.Name)
		var schema jsonschema.Schema
		err := json.Unmarshal(params, &schema)
		if err == nil {
			resolved[m.Name], err = schema.Resolve(nil)
		}
		if err != nil {
			t.Fatal(m.Name, err)
		}
	}
	return resolved
}

// If the schema of a method refuses a request, the gateway refuses it as well.
func TestSchemasAgreeWithTheGateway(t *testing.T) {
	s := New(t)
	of := schemas(t, s)
	check := func(body string) (refused bool) {
		t.Helper()
		var req struct {
			Method string
			Params any
		}
		if json.Unmarshal([]byte(body), &req) != nil || of[req.Method] == nil {
			return false
		}
		if _, byName := req.Params.(map[string]any); !byName {
			return false // params by position, or no params
		}
		w := s.Post(body)
		err := of[req.Method].Validate(req.Params)
		if err != nil && w.Code != http.StatusBadRequest {
			t.Errorf("the gateway accepts %s, which the schema refuses: %v\n%s", body, err, w.Body)
		}
		return err != nil
	}
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range bytes.Lines(text) {
			if body, ok := strings.CutPrefix(string(line), "> "); ok {
				check(body)
			}
		}
	}
	for method, params := range map[string][]string{
		rpc.MethodSandboxStart: {
			`{}`, `{"sandbox":null}`, `{"sandbox":"a/b"}`, `{"sandbox":"-a"}`, `{"sandbox":"a","namespace":"*"}`, `{"sandbox":"a","x":1}`, `{"sandbox":"a","config":[]}`,
			`{"sandbox":"a","config":{"envs":["A=1",null]}}`, `{"sandbox":"a","config":{"memory":1.5}}`, `{"sandbox":"a","config":{"x":1}}`,
			`{"sandbox":"a","config":{"envs":"A=1"}}`, `{"sandbox":"a","config":{"scripts":[]}}`,
		},
		rpc.MethodSandboxStop:       {`{"sandbox":7}`, `{"sandbox":""}`},
		rpc.MethodSandboxList:       {`{"namespace":"**"}`, `{"limit":-1}`, `{"limit":"1"}`, `{"limit":1.5}`, `{"sandbox":"a"}`, `{"after":1}`},
		rpc.MethodSandboxGet:        {`{}`, `{"sandbox":"a/b"}`, `{"sandbox":"a","namespace":"*"}`},
		rpc.MethodSandboxMetricsGet: {`{"namespace":"**"}`, `{"sandbox":"*"}`, `{"sandbox":""}`},
		rpc.MethodSandboxReplRun: {
			`{"sandbox":"a","language":"python"}`, `{"sandbox":"a","code":"1","language":7}`, `{"sandbox":"a","code":"1","context":"a","results":1}`, `{"sandbox":"a","language":"ruby","code":""}`,
			`{"sandbox":"a","language":"python","code":"1","timeout":-1}`, `{"sandbox":"a","language":"python","code":"1","timeout":"1"}`,
		},
		rpc.MethodContextCreate:     {`{"sandbox":"a"}`, `{"sandbox":"a","language":"ruby"}`, `{"sandbox":"a","language":"python","context":1}`},
		rpc.MethodContextRestart:    {`{"sandbox":"a"}`},
		rpc.MethodContextRemove:     {`{"sandbox":"a"}`},
		rpc.MethodProcessStart:      {`{"sandbox":"a"}`, `{"sandbox":"a","command":"x","encoding":"hex"}`, `{"sandbox":"a","command":"x","terminal":{"cols":0,"rows":1}}`, `{"sandbox":"a","command":"x","terminal":{"cols":1}}`},
		rpc.MethodProcessGet:        {`{"sandbox":"a","pid":0}`, `{"sandbox":"a","pid":"1"}`},
		rpc.MethodProcessWait:       {`{"sandbox":"a","tag":"x","timeout":-1}`},
		rpc.MethodProcessSignal:     {`{"sandbox":"a","tag":"x"}`, `{"sandbox":"a","tag":"x","signal":""}`, `{"sandbox":"a","tag":"x","signal":9}`},
		rpc.MethodProcessResize:     {`{"sandbox":"a","tag":"x","cols":1}`, `{"sandbox":"a","tag":"x","cols":1,"rows":65536}`},
		rpc.MethodFSRead:            {`{"sandbox":"a"}`, `{"sandbox":"a","path":""}`, `{"sandbox":"a","path":"x","offset":-1}`, `{"sandbox":"a","path":"x","length":-1}`},
		rpc.MethodFSWrite:           {`{"sandbox":"a","path":"x"}`, `{"sandbox":"a","path":"x","content":"","mode":"8"}`},
		rpc.MethodFSList:            {`{"sandbox":"a","path":"x","depth":-1}`},
		rpc.MethodFSMove:            {`{"sandbox":"a","from":"x"}`, `{"sandbox":"a","from":"","to":"x"}`},
		rpc.MethodSandboxCommandRun: {`{"sandbox":"a","command":"x","grace":-1}`, `{"sandbox":"a"}`, `{"sandbox":"a","command":""}`, `{"sandbox":"a","command":"x","args":[null]}`, `{"sandbox":"a","command":"x","args":[1]}`},
	} {
		for _, p := range params {
			if !check(Request(method, p)) {
				t.Errorf("the schema of %s accepts %s", method, p)
			}
		}
	}
}
