package rpc

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"reflect"
	"strings"
	"sync"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
)

// parsedRequest is a member of a body: a call, or what keeps it from being one.
type parsedRequest struct {
	rpc.Request
	bad *rpc.Error
}

// parseBody reads a whole body. Nothing of it is run before all of it was read as strict JSON: no
// duplicate names, valid UTF-8, nested no deeper than rpc.MaxDepth. The requests share its memory.
func parseBody(body []byte) (requests []parsedRequest, batch bool, err *rpc.Error) {
	if depth(body) > rpc.MaxDepth {
		return nil, false, parseError(fmt.Errorf("nested deeper than %d levels", rpc.MaxDepth))
	}
	p := newParser(body)
	defer p.free()
	if batch = p.PeekKind() == '['; batch {
		p.ReadToken()
	}
	for len(requests) <= rpc.MaxBatch && (!batch || p.PeekKind() != ']') {
		req, err := p.request()
		if err != nil {
			return nil, false, parseError(err)
		}
		requests = append(requests, req)
		if !batch {
			break
		}
	}
	if len(requests) > rpc.MaxBatch {
		return nil, false, invalidRequest("a batch must hold at most %d requests", rpc.MaxBatch)
	}
	if batch {
		if _, err := p.ReadToken(); err != nil {
			return nil, false, parseError(err)
		}
	}
	if _, err := p.ReadToken(); err == nil {
		return nil, false, parseError(errors.New("the body holds more than one JSON value"))
	} else if err != io.EOF {
		return nil, false, parseError(err)
	}
	if len(requests) == 0 {
		return nil, false, invalidRequest("a batch must hold at least one request")
	}
	return requests, batch, nil
}

// maxPooled is how long a text may be whose parser is kept for other requests.
const maxPooled = 64 << 10

var null = jsontext.Value("null")

// parser reads JSON that is in memory.
type parser struct {
	jsontext.Decoder
	text   []byte
	source bytes.Buffer
}

var parsers = sync.Pool{New: func() any { return new(parser) }}

func newParser(text []byte) *parser {
	p := parsers.Get().(*parser)
	p.text, p.source = text, *bytes.NewBuffer(text)
	p.Reset(&p.source)
	return p
}

// free keeps p, and text with it, for another request.
func (p *parser) free() {
	if len(p.text) <= maxPooled {
		parsers.Put(p)
	}
}

// member reads the next member of an object.
func (p *parser) member() (name, value jsontext.Value, err error) {
	if name, err = p.value(); err == nil {
		value, err = p.value()
	}
	return name, value, err
}

// value reads the next value. Unlike that of ReadValue, it stays as it is.
func (p *parser) value() (jsontext.Value, error) {
	v, err := p.ReadValue()
	end := int(p.InputOffset())
	return p.text[end-len(v) : end], err
}

// request reads the next value as a request object. Its error is that the text is not strict JSON.
func (p *parser) request() (req parsedRequest, err error) {
	if p.PeekKind() != '{' {
		_, err := p.ReadValue()
		return parsedRequest{Request: rpc.Request{ID: null}, bad: invalidRequest("a request must be a JSON object")}, err
	}
	p.ReadToken()
	var version, method jsontext.Value
	var unknown []string
	for p.PeekKind() != '}' {
		name, value, err := p.member()
		if err != nil {
			return req, err
		}
		switch string(unquote(name)) {
		case "jsonrpc":
			version = value
		case "method":
			method = value
		case "params":
			req.Params = value
		case "id":
			req.ID = value
		default:
			unknown = append(unknown, string(unquote(name)))
		}
	}
	if _, err := p.ReadToken(); err != nil {
		return req, err
	}
	req.bad = req.complete(version, method, unknown)
	if req.bad != nil && req.ID == nil {
		req.ID = null
	}
	return req, nil
}

// complete checks a request whose ID and Params are as they came, and fills in the rest.
func (req *parsedRequest) complete(version, method jsontext.Value, unknown []string) *rpc.Error {
	switch req.ID.Kind() {
	case '"', '0', 'n', jsontext.KindInvalid: // the last: absent
	default:
		req.ID = nil
		return invalidRequest("id must be a string, a number or null")
	}
	if unknown != nil {
		return invalidRequest("%s is not a known member", rpcerr.Shorten(unknown[0]))
	}
	if version.Kind() != '"' || string(unquote(version)) != rpc.Version {
		return invalidRequest(`jsonrpc must be the string "2.0"`)
	}
	if method.Kind() != '"' {
		return invalidRequest("method must be a string")
	}
	req.JSONRPC, req.Method = rpc.Version, string(unquote(method))
	switch req.Params.Kind() {
	case '{', '[', jsontext.KindInvalid:
		return nil
	default:
		return invalidRequest("params must be an object or an array")
	}
}

// unquote is the text of a JSON string, which is strict.
func unquote(s jsontext.Value) []byte {
	if bytes.IndexByte(s, '\\') < 0 {
		return s[1 : len(s)-1]
	}
	text, _ := jsontext.AppendUnquote(nil, s)
	return text
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

// countMessages reads a whole body as strict JSON, and returns how many messages it holds.
func countMessages(body []byte) (n int, bad *rpc.Error) {
	if depth(body) > rpc.MaxDepth {
		return 0, parseError(fmt.Errorf("nested deeper than %d levels", rpc.MaxDepth))
	}
	p := newParser(body)
	defer p.free()
	batch := p.PeekKind() == '['
	if batch {
		p.ReadToken()
	}
	for !batch && n == 0 || batch && p.PeekKind() != ']' {
		if _, err := p.value(); err != nil {
			return 0, parseError(err)
		}
		n++
	}
	if batch {
		p.ReadToken()
	}
	switch _, err := p.ReadToken(); {
	case err == nil:
		return 0, parseError(errors.New("the body holds more than one JSON value"))
	case err != io.EOF:
		return 0, parseError(err)
	case n == 0 || n > rpc.MaxBatch:
		return 0, invalidRequest("a batch must hold 1 to %d requests", rpc.MaxBatch)
	}
	return n, nil
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
	switch raw.Kind() {
	case '{':
	case '[':
		named, err := byName(raw, params)
		if err != nil {
			return err
		}
		raw = named
	default:
		raw = jsontext.Value("{}")
	}
	if err := json.Unmarshal(raw, into, json.RejectUnknownMembers(true)); err != nil {
		return invalidParams("%s", explain("params", err))
	}
	if at := nullElement(raw); at != "" {
		return invalidParams("params%s must not be null", rpcerr.Shorten(strings.ReplaceAll(at, "/", ".")))
	}
	v := reflect.ValueOf(into).Elem()
	for i, p := range params {
		if p.required && v.Field(i).IsZero() && !has(raw, p.name) {
			return invalidParams("params.%s is required", p.name)
		}
	}
	return nil
}

// nullElement finds a null in an array: a member that is null is as if it were left out, but an element
// has its place, and Go would make something empty of it.
func nullElement(raw jsontext.Value) (pointer string) {
	if !bytes.Contains(raw, null) {
		return ""
	}
	p := newParser(raw)
	defer p.free()
	for {
		t, err := p.ReadToken()
		if err != nil {
			return ""
		}
		if in, _ := p.StackIndex(p.StackDepth()); t.Kind() == 'n' && in == '[' {
			return string(p.StackPointer())
		}
	}
}

// byName makes an object of positional params.
func byName(raw jsontext.Value, params []param) (jsontext.Value, *rpc.Error) {
	var values []jsontext.Value
	if err := json.Unmarshal(raw, &values); err != nil {
		return nil, invalidParams("%s", explain("params", err))
	}
	if len(values) > len(params) {
		return nil, invalidParams("params has %d positions; this method takes %d", len(values), len(params))
	}
	members := map[string]jsontext.Value{}
	for i, v := range values {
		members[params[i].name] = v
	}
	named, err := json.Marshal(members)
	if err != nil {
		return nil, invalidParams("%s", explain("params", err))
	}
	return named, nil
}

// has says whether an object has a member that is not null.
func has(object jsontext.Value, name string) bool {
	p := newParser(object)
	defer p.free()
	p.ReadToken()
	for p.PeekKind() != '}' {
		member, value, err := p.member()
		if err != nil {
			return false
		}
		if string(unquote(member)) == name {
			return value.Kind() != 'n'
		}
	}
	return false
}

// explain says in the words of JSON, not of Go, why a value does not fit.
func explain(root string, err error) string {
	e, ok := errors.AsType[*json.SemanticError](err)
	if !ok {
		return strings.TrimPrefix(err.Error(), "jsontext: ")
	}
	at := strings.TrimPrefix(root+strings.ReplaceAll(string(e.JSONPointer), "/", "."), ".")
	if e.Err == json.ErrUnknownName {
		return fmt.Sprintf("%s is not a known member", rpcerr.Shorten(at))
	}
	return fmt.Sprintf("%s must be %s", rpcerr.Shorten(at), jsonKind(e.GoType))
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

func parseError(err error) *rpc.Error {
	return &rpc.Error{Code: rpc.CodeParse, Message: "the body is not strict JSON: " + rpcerr.Shorten(strings.TrimPrefix(err.Error(), "jsontext: "))}
}

func invalidRequest(format string, args ...any) *rpc.Error {
	return &rpc.Error{Code: rpc.CodeInvalidRequest, Message: "not a JSON-RPC 2.0 request: " + fmt.Sprintf(format, args...)}
}

func invalidParams(format string, args ...any) *rpc.Error {
	return &rpc.Error{Code: rpc.CodeInvalidParams, Message: fmt.Sprintf(format, args...)}
}
