package mcp

import (
	"fmt"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// This file checks the form of each message before the library gets it, because the library's errors quote Go types, and
// lack the id of the request.

// message is the part of a JSON-RPC message that the handler reads before it passes the request to the library.
type message struct {
	Version jsontext.Value `json:"jsonrpc"`
	ID      jsontext.Value `json:"id"`
	Method  jsontext.Value `json:"method"`
	Params  jsontext.Value `json:"params"`
	Result  jsontext.Value `json:"result"`
	Error   jsontext.Value `json:"error"`
}

// paramsOf are the params that serve reads.
type paramsOf struct {
	RequestID jsontext.Value `json:"requestId"`
	Level     jsontext.Value `json:"level"`
}

// form is what the JSON of a param must be.
type form string

const (
	textForm form = "a string"
	object   form = "an object"
	texts    form = "an object of strings"
)

// param is a param whose form the library requires.
type param struct {
	name     string
	form     form
	required bool
}

var cursor = []param{{"cursor", textForm, false}}

// methods are the methods of MCP that this server has, with their params. The other members of params are the library's or
// the tool's business.
var methods = map[string][]param{
	"initialize":               {{"protocolVersion", textForm, true}, {"capabilities", object, false}, {"clientInfo", object, false}},
	"ping":                     nil,
	"logging/setLevel":         {{"level", textForm, true}},
	"server/discover":          nil,
	"tools/list":               cursor,
	"tools/call":               {{"name", textForm, true}},
	"prompts/list":             cursor,
	"prompts/get":              {{"name", textForm, true}, {"arguments", texts, false}},
	"resources/list":           cursor, // always empty: sandboxes have too many files
	"resources/templates/list": cursor,
	"resources/read":           {{"uri", textForm, true}},

	"notifications/initialized":        nil,
	"notifications/cancelled":          nil,
	"notifications/progress":           nil,
	"notifications/roots/list_changed": nil,
}

const notification = "notifications/"

// method returns the method of m, or "" if m is a response or is not valid.
func (m *message) method() string {
	var method string
	_ = json.Unmarshal(m.Method, &method)
	return method
}

// checkMessages checks the messages in body. It returns the message if body is not a batch. If one is
// not valid, it returns what is wrong with the first such message, and its id, which is nil if it has no valid one.
func checkMessages(body []byte) (single message, id jsontext.Value, rpcErr *rpc.Error) {
	all := []jsontext.Value{body}
	batch := json.Unmarshal(body, &all) == nil
	if !batch {
		all = []jsontext.Value{body}
	}
	for _, text := range all {
		m := message{}
		if json.Unmarshal(text, &m) != nil || text.Kind() != '{' {
			return message{}, nil, invalidMessage("a message must be a JSON object")
		}
		if rpcErr := m.check(); rpcErr != nil {
			if kind := m.ID.Kind(); kind == '"' || kind == '0' {
				id = m.ID
			}
			return message{}, id, rpcErr
		}
		single = m
	}
	if batch {
		single = message{}
	}
	return single, nil, nil
}

// check returns what is wrong with the form of m, or nil.
func (m *message) check() *rpc.Error {
	var version string
	if json.Unmarshal(m.Version, &version) != nil || version != rpc.Version {
		return invalidMessage(`jsonrpc must be the string "2.0"`)
	}
	switch m.ID.Kind() {
	case '"', '0', jsontext.KindInvalid: // KindInvalid: there is no id
	default:
		return invalidMessage("id must be a string or a number")
	}
	if m.Method == nil && (m.Result != nil || m.Error != nil) {
		return nil // a response
	}
	if m.Method.Kind() != '"' {
		return invalidMessage("method must be a string")
	}
	method := m.method()
	params, exists := methods[method]
	switch {
	case method == "subscriptions/listen": // its response would never end
		return &rpc.Error{Code: rpc.CodeMethodNotFound, Message: "subscriptions are not supported: the lists of this server never change"}
	case !exists:
		return &rpc.Error{Code: rpc.CodeMethodNotFound, Message: fmt.Sprintf("there is no method %q", bounded.Short(method))}
	case m.ID == nil && !strings.HasPrefix(method, notification):
		return invalidMessage("%s needs an id", method)
	case m.ID != nil && strings.HasPrefix(method, notification):
		return invalidMessage("%s is a notification, which must not have an id", method)
	}
	var members map[string]jsontext.Value
	if kind := m.Params.Kind(); kind != '{' && kind != 'n' && kind != jsontext.KindInvalid || m.Params != nil && json.Unmarshal(m.Params, &members) != nil {
		return invalidParam("params must be an object")
	}
	for _, p := range slices.Concat(params, []param{{"_meta", object, false}}) {
		value, given := members[p.name]
		switch {
		case (!given || value.Kind() == 'n') && p.required:
			return invalidParam("params.%s is required", p.name)
		case given && value.Kind() != 'n' && !p.form.matches(value):
			return invalidParam("params.%s must be %s", p.name, p.form)
		}
	}
	return nil
}

// matches reports whether value has the form f.
func (f form) matches(value jsontext.Value) bool {
	switch f {
	case textForm:
		return value.Kind() == '"'
	case object:
		return value.Kind() == '{'
	default:
		var members map[string]jsontext.Value
		if json.Unmarshal(value, &members) != nil {
			return false
		}
		for _, member := range members {
			if member.Kind() != '"' {
				return false
			}
		}
		return true
	}
}

// checkRevision checks the header with the revision of the protocol. The library explains revisions after the newest one
// to clients, which then use an older one.
func checkRevision(revision string) *rpc.Error {
	if revision == "" || slices.Contains(Revisions, revision) || revision > Revisions[0] {
		return nil
	}
	return &rpc.Error{Code: rpc.CodeInvalidRequest, Message: fmt.Sprintf("%s %q is not supported; use one of %s", revisionHeader,
		bounded.Short(revision), strings.Join(Revisions, ", "))}
}

func invalidMessage(format string, args ...any) *rpc.Error {
	return &rpc.Error{Code: rpc.CodeInvalidRequest, Message: "not a JSON-RPC 2.0 message: " + fmt.Sprintf(format, args...)}
}

func invalidParam(format string, args ...any) *rpc.Error {
	return &rpc.Error{Code: rpc.CodeInvalidParams, Message: fmt.Sprintf(format, args...)}
}
