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
	"github.com/msbd/msbd/daemon/internal/sys/bounded"
)

// parsedRequest is one request in a body. If it is not a valid request, rpcErr says why.
type parsedRequest struct {
	rpc.Request
	rpcErr *rpc.Error
}

// parseBody parses a request or a batch. The complete body must be strict JSON (no duplicate names, valid UTF-8, nested
// at most rpc.MaxDepth levels deep) before any request in it is run. The returned requests share the memory of body.
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
		return nil, false, badBatch()
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
		return nil, false, badBatch()
	}
	return requests, batch, nil
}

// maxPooled is the length in bytes of the longest text whose parser is kept in the pool.
const maxPooled = 64 << 10

var null = jsontext.Value("null")

// parser reads JSON from memory.
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

// free returns p, which still refers to its text, to the pool. p must not be used afterwards.
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

// value reads the next value. Unlike the result of ReadValue, it stays valid after the next read.
func (p *parser) value() (jsontext.Value, error) {
	v, err := p.ReadValue()
	end := int(p.InputOffset())
	return p.text[end-len(v) : end], err
}

// request reads the next value as a request object. It returns an error only if the text is not strict JSON; any other
// fault is in req.rpcErr.
func (p *parser) request() (req parsedRequest, err error) {
	if p.PeekKind() != '{' {
		_, err := p.ReadValue()
		return parsedRequest{Request: rpc.Request{ID: null}, rpcErr: invalidRequest("a request must be a JSON object")}, err
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
	req.rpcErr = req.validate(version, method, unknown)
	if req.rpcErr != nil && req.ID == nil {
		req.ID = null
	}
	return req, nil
}

// validate checks a request whose ID and Params are already set, and sets its JSONRPC and Method.
func (req *parsedRequest) validate(version, method jsontext.Value, unknown []string) *rpc.Error {
	switch req.ID.Kind() {
	case '"', '0', 'n', jsontext.KindInvalid: // KindInvalid: there is no id
	default:
		req.ID = nil
		return invalidRequest("id must be a string, a number or null")
	}
	if unknown != nil {
		return invalidRequest("%s is not a known member", bounded.Short(unknown[0]))
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

// unquote returns the text of a JSON string that has been parsed as strict JSON.
func unquote(s jsontext.Value) []byte {
	if bytes.IndexByte(s, '\\') < 0 {
		return s[1 : len(s)-1]
	}
	text, _ := jsontext.AppendUnquote(nil, s)
	return text
}

// depth returns how many levels deep the brackets and braces in body are nested. body need not be valid JSON.
func depth(body []byte) int {
	var current, deepest int
	inString := false
	for i := 0; i < len(body); i++ {
		switch c := body[i]; {
		case inString && c == '\\':
			i++
		case c == '"':
			inString = !inString
		case inString:
		case c == '{' || c == '[':
			current++
			deepest = max(deepest, current)
		case c == '}' || c == ']':
			current--
		}
	}
	return deepest
}

// countMessages checks that body is strict JSON and returns how many messages it holds: 1, or the length of a batch.
func countMessages(body []byte) (n int, rpcErr *rpc.Error) {
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
		return 0, badBatch()
	}
	return n, nil
}

// param is one parameter of a method.
type param struct {
	name     string
	required bool
	kind     reflect.Type
	index    []int // of the field
}

// membersOf lists the fields of a struct type in their order, which for params is the order of positional params. Those of an
// embedded struct are in its place.
func membersOf(t reflect.Type) []param {
	var params []param
	for _, f := range reflect.VisibleFields(t) {
		if f.Anonymous {
			continue
		}
		name, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		params = append(params, param{name, options != "omitzero", f.Type, f.Index})
	}
	return params
}

// decodeParams decodes params, given by name or by position, into a params struct.
func decodeParams(raw jsontext.Value, params []param, into any) *rpc.Error {
	switch raw.Kind() {
	case '{':
	case '[':
		object, err := byName(raw, params)
		if err != nil {
			return err
		}
		raw = object
	default:
		raw = jsontext.Value("{}")
	}
	if err := json.Unmarshal(raw, into, json.RejectUnknownMembers(true)); err != nil {
		return invalidParams("%s", explain("params", err))
	}
	if pointer := nullElement(raw); pointer != "" {
		return invalidParams("params%s must not be null", bounded.Short(strings.ReplaceAll(pointer, "/", ".")))
	}
	v := reflect.ValueOf(into).Elem()
	for _, p := range params {
		if p.required && v.FieldByIndex(p.index).IsZero() && !hasMember(raw, p.name) {
			return invalidParams("params.%s is required", p.name)
		}
	}
	return nil
}

// nullElement returns a JSON pointer to the first null inside an array, or "" if there is none. A null member of an
// object is the same as an absent one, but a null array element would be decoded as a zero value and so must be refused.
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

// byName converts positional params to an object.
func byName(raw jsontext.Value, params []param) (jsontext.Value, *rpc.Error) {
	var values []jsontext.Value
	if err := json.Unmarshal(raw, &values); err != nil {
		return nil, invalidParams("%s", explain("params", err))
	}
	if len(values) > len(params) {
		return nil, invalidParams("params has %d values; this method takes at most %d", len(values), len(params))
	}
	members := map[string]jsontext.Value{}
	for i, v := range values {
		members[params[i].name] = v
	}
	object, err := json.Marshal(members)
	if err != nil {
		return nil, invalidParams("%s", explain("params", err))
	}
	return object, nil
}

// hasMember reports whether object has a member with that name which is not null.
func hasMember(object jsontext.Value, name string) bool {
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

// explain describes a decoding error in JSON terms rather than in terms of Go types. root is the name of the value that
// was decoded.
func explain(root string, err error) string {
	e, ok := errors.AsType[*json.SemanticError](err)
	if !ok {
		return strings.TrimPrefix(err.Error(), "jsontext: ")
	}
	path := strings.TrimPrefix(root+strings.ReplaceAll(string(e.JSONPointer), "/", "."), ".")
	if e.Err == json.ErrUnknownName {
		return fmt.Sprintf("%s is not a known member", bounded.Short(path))
	}
	return fmt.Sprintf("%s must be %s", bounded.Short(path), jsonKind(e.GoType))
}

// jsonKind returns the JSON type that t is decoded from, with its article.
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
	case reflect.Bool:
		return "true or false"
	case reflect.Float64:
		return "a number"
	case reflect.Slice:
		if t.Elem().Kind() == reflect.String {
			return "an array of strings"
		}
		return "an array"
	default:
		return "an object"
	}
}

// parseError returns the error for a body that is not strict JSON.
func parseError(err error) *rpc.Error {
	message := "the body is not strict JSON: "
	syntax, ok := errors.AsType[*jsontext.SyntacticError](err)
	switch {
	case err == io.EOF:
		message = "the body is empty; send a JSON-RPC 2.0 request"
	case errors.Is(err, io.ErrUnexpectedEOF):
		message += "it ends before its last value is complete"
	case ok && syntax.Err == jsontext.ErrDuplicateName:
		message += fmt.Sprintf("the name %q occurs twice in an object, at byte %d", bounded.Short(syntax.JSONPointer.LastToken()), syntax.ByteOffset+1)
	case ok:
		message += bounded.Short(fmt.Sprintf("%v, at byte %d", syntax.Err, syntax.ByteOffset+1))
	default:
		message += bounded.Short(err.Error())
	}
	return &rpc.Error{Code: rpc.CodeParse, Message: message}
}

func invalidRequest(format string, args ...any) *rpc.Error {
	return &rpc.Error{Code: rpc.CodeInvalidRequest, Message: "not a JSON-RPC 2.0 request: " + fmt.Sprintf(format, args...)}
}

func badBatch() *rpc.Error {
	return invalidRequest("a batch must hold 1 to %d requests", rpc.MaxBatch)
}

func invalidParams(format string, args ...any) *rpc.Error {
	return &rpc.Error{Code: rpc.CodeInvalidParams, Message: fmt.Sprintf(format, args...)}
}
