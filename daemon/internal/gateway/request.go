package gateway

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"slices"
	"strings"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
)

// splitBatch reads a whole body and returns the raw requests in it. Nothing of a body is run
// before all of it was read as strict JSON: no duplicate names, valid UTF-8, nested no deeper
// than rpc.MaxDepth.
func splitBatch(body []byte) (members []jsontext.Value, batch bool, err *rpc.Error) {
	if depth(body) > rpc.MaxDepth {
		return nil, false, parseError(fmt.Errorf("nested deeper than %d levels", rpc.MaxDepth))
	}
	dec := jsontext.NewDecoder(bytes.NewBuffer(body))
	if batch = dec.PeekKind() == '['; batch {
		dec.ReadToken()
	}
	for len(members) <= rpc.MaxBatch && (!batch || dec.PeekKind() != ']') {
		v, err := dec.ReadValue()
		if err != nil {
			return nil, false, parseError(err)
		}
		members = append(members, v.Clone())
		if !batch {
			break
		}
	}
	if len(members) > rpc.MaxBatch {
		return nil, false, invalidRequest("a batch must hold at most %d requests", rpc.MaxBatch)
	}
	if batch {
		if _, err := dec.ReadToken(); err != nil {
			return nil, false, parseError(err)
		}
	}
	if _, err := dec.ReadToken(); err == nil {
		return nil, false, parseError(errors.New("the body holds more than one JSON value"))
	} else if err != io.EOF {
		return nil, false, parseError(err)
	}
	if len(members) == 0 {
		return nil, false, invalidRequest("a batch must hold at least one request")
	}
	return members, batch, nil
}

// depth is how deep body's brackets are nested, whether or not it is JSON.
func depth(body []byte) int {
	var now, deepest int
	inString := false
	for i := 0; i < len(body); i++ {
		switch c := body[i]; {
		case inString && c == '\\':
			i++
		case c == '"':
			inString = !inString
		case inString:
		case c == '{' || c == '[':
			now++
			deepest = max(deepest, now)
		case c == '}' || c == ']':
			now--
		}
	}
	return deepest
}

// parseRequest reads one request object. The request's ID is set, when it could be read, also
// beside an error.
func parseRequest(raw jsontext.Value) (rpc.Request, *rpc.Error) {
	var req rpc.Request
	if raw.Kind() != '{' {
		return req, invalidRequest("a request must be a JSON object")
	}
	var m map[string]jsontext.Value
	if err := json.Unmarshal(raw, &m); err != nil {
		return req, invalidRequest("%s", explain("", err))
	}
	switch m["id"].Kind() {
	case '"', '0', 'n':
		req.ID = m["id"]
	case jsontext.KindInvalid: // absent
	default:
		return req, invalidRequest("id must be a string, a number or null")
	}
	for _, name := range slices.Sorted(maps.Keys(m)) {
		switch name {
		case "jsonrpc", "method", "params", "id":
		default:
			return req, invalidRequest("%s is not a known member", shorten(name))
		}
	}
	if json.Unmarshal(m["jsonrpc"], &req.JSONRPC) != nil || req.JSONRPC != rpc.Version {
		return req, invalidRequest(`jsonrpc must be the string "2.0"`)
	}
	if m["method"].Kind() != '"' || json.Unmarshal(m["method"], &req.Method) != nil {
		return req, invalidRequest("method must be a string")
	}
	switch req.Params = m["params"]; req.Params.Kind() {
	case '{', '[', jsontext.KindInvalid:
	default:
		return req, invalidRequest("params must be an object or an array")
	}
	return req, nil
}

// param is one member of a method's params.
type param struct {
	name     string
	required bool
	kind     reflect.Type
}

// membersOf lists the members of a struct in its order: for params, the one of positional params.
func membersOf(t reflect.Type) []param {
	var params []param
	for f := range t.Fields() {
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		params = append(params, param{name, options != "omitzero", f.Type})
	}
	return params
}

// decodeParams reads params, by name or by position, into a params struct.
func decodeParams(raw jsontext.Value, params []param, into any) *rpc.Error {
	members := map[string]jsontext.Value{}
	switch raw.Kind() {
	case '{':
		if err := json.Unmarshal(raw, &members); err != nil {
			return invalidParams("%s", explain("params", err))
		}
	case '[':
		var values []jsontext.Value
		if err := json.Unmarshal(raw, &values); err != nil {
			return invalidParams("%s", explain("params", err))
		}
		if len(values) > len(params) {
			return invalidParams("params has %d positions; this method takes %d", len(values), len(params))
		}
		for i, v := range values {
			members[params[i].name] = v
		}
		named, err := json.Marshal(members)
		if err != nil {
			return invalidParams("%s", explain("params", err))
		}
		raw = named
	default:
		raw = jsontext.Value("{}")
	}
	for _, p := range params {
		if v := members[p.name]; p.required && (v == nil || v.Kind() == 'n') {
			return invalidParams("params.%s is required", p.name)
		}
	}
	if err := json.Unmarshal(raw, into, json.RejectUnknownMembers(true)); err != nil {
		return invalidParams("%s", explain("params", err))
	}
	return nil
}

// explain says in the words of JSON, not of Go, why a value does not fit.
func explain(root string, err error) string {
	e, ok := errors.AsType[*json.SemanticError](err)
	if !ok {
		return strings.TrimPrefix(err.Error(), "jsontext: ")
	}
	at := strings.TrimPrefix(root+strings.ReplaceAll(string(e.JSONPointer), "/", "."), ".")
	if e.Err == json.ErrUnknownName {
		return fmt.Sprintf("%s is not a known member", shorten(at))
	}
	return fmt.Sprintf("%s must be %s", shorten(at), jsonKind(e.GoType))
}

// jsonKind names what JSON a Go type is read from.
func jsonKind(t reflect.Type) string {
	for t != nil && t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t == nil {
		return "of another type"
	}
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Int:
		return "an integer"
	case reflect.Float64:
		return "a number"
	case reflect.Slice:
		return "an array or null"
	default:
		return "an object"
	}
}

// shorten keeps what a client sent from filling an error message.
func shorten(s string) string {
	if len(s) > 100 {
		return strings.ToValidUTF8(s[:100], "") + "…"
	}
	return s
}

func parseError(err error) *rpc.Error {
	return &rpc.Error{Code: rpc.CodeParse, Message: "the body is not strict JSON: " + shorten(strings.TrimPrefix(err.Error(), "jsontext: "))}
}

func invalidRequest(format string, args ...any) *rpc.Error {
	return &rpc.Error{Code: rpc.CodeInvalidRequest, Message: "not a JSON-RPC 2.0 request: " + fmt.Sprintf(format, args...)}
}

func invalidParams(format string, args ...any) *rpc.Error {
	return &rpc.Error{Code: rpc.CodeInvalidParams, Message: fmt.Sprintf(format, args...)}
}
