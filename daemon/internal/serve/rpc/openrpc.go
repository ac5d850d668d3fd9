package rpc

import (
	"maps"
	"math"
	"reflect"
	"slices"
	"time"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/name"
)

// document is the OpenRPC description of the methods.
type document struct {
	OpenRPC    string       `json:"openrpc"`
	Info       info         `json:"info"`
	Methods    []methodInfo `json:"methods"`
	Components components   `json:"components"`
}

type components struct {
	Errors map[string]errorInfo `json:"errors"`
}

// errorInfo describes an error code. Data is what the caller can do about it.
type errorInfo struct {
	Code    rpc.Code `json:"code"`
	Message string   `json:"message"`
	Data    string   `json:"data"`
}

type reference struct {
	Ref string `json:"$ref"`
}

// info describes the API. Version is the version of the API, and Server that of msbd.
type info struct {
	Title   string `json:"title"`
	Version string `json:"version"`
	Server  string `json:"x-server-version"`
}

type methodInfo struct {
	Name           string  `json:"name"`
	ParamStructure string  `json:"paramStructure"`
	Params         []value `json:"params"`
	Result         value   `json:"result"`
	// Errors are the errors that the method can return.
	Errors []reference `json:"errors"`
	// Scope is the scope that a key needs to call the method. It is an OpenRPC extension, hence the x-.
	Scope keys.Scope `json:"x-scope"`
	// Stream says that the method has events: "optional", or "required" if it responds only with a stream of events.
	Stream eventUse `json:"x-stream,omitzero"`
}

type value struct {
	Name     string `json:"name"`
	Required bool   `json:"required,omitzero"`
	Schema   schema `json:"schema"`
}

// schema is the subset of JSON Schema that describes the types of api/rpc.
type schema struct {
	Type                 any               `json:"type,omitzero"` // a name, a list of a name and "null", or absent for any type
	Properties           map[string]schema `json:"properties,omitzero"`
	Required             []string          `json:"required,omitzero"`
	Items                *schema           `json:"items,omitzero"`
	Enum                 []string          `json:"enum,omitzero"`
	Format               string            `json:"format,omitzero"`
	Pattern              string            `json:"pattern,omitzero"`
	MinLength            int               `json:"minLength,omitzero"`
	Minimum              *int              `json:"minimum,omitzero"`
	Maximum              *int              `json:"maximum,omitzero"`
	AdditionalProperties any               `json:"additionalProperties,omitzero"` // a schema or false
	ContentEncoding      string            `json:"contentEncoding,omitzero"`
}

// describe builds the result of rpc.discover from the table of methods and the version of msbd.
func describe(table []method, version string) jsontext.Value {
	doc := document{
		OpenRPC: "1.3.2", Info: info{Title: "msbd", Version: "1", Server: version},
		Components: components{Errors: map[string]errorInfo{}},
	}
	var errs []reference
	for _, c := range rpc.Codes {
		doc.Components.Errors[c.Name] = errorInfo{Code: c.Code, Message: c.Meaning, Data: c.Remedy}
		errs = append(errs, reference{"#/components/errors/" + c.Name})
	}
	for _, m := range table {
		mi := methodInfo{
			Name: m.name, ParamStructure: "either", Errors: errs, Scope: m.scope, Stream: m.events,
			Result: value{Name: "result", Schema: schemaOf(m.result)},
		}
		params := m.paramsSchema()
		for _, p := range m.params {
			mi.Params = append(mi.Params, value{Name: p.name, Required: p.required, Schema: params.Properties[p.name]})
		}
		doc.Methods = append(doc.Methods, mi)
	}
	return encode(doc)
}

// encode returns a description as JSON, with object members in a fixed order.
func encode(description any) jsontext.Value {
	b, err := json.Marshal(description, json.Deterministic(true))
	if err != nil {
		panic(err) // cannot happen: descriptions consist only of the types above
	}
	return b
}

// paramsSchema returns the schema of the params by name. It includes the constraints that handlers check in addition
// to the types.
func (m *method) paramsSchema() schema {
	s := objectOf(m.params)
	refine := func(of schema, name string, how func(*schema)) {
		if member, ok := of.Properties[name]; ok {
			how(&member)
			of.Properties[name] = member
		}
	}
	refine(s, "sandbox", func(s *schema) { s.Pattern = name.Pattern })
	refine(s, "namespace", func(s *schema) {
		if s.Pattern = name.Pattern; m.allNamespaces {
			s.Pattern += `|^\*$`
		}
	})
	refine(s, "language", func(s *schema) { s.Enum = slices.Sorted(maps.Keys(languages)) })
	for _, name := range []string{"command", "path", "from", "to", "signal"} {
		refine(s, name, func(s *schema) { s.MinLength = 1 })
	}
	for _, name := range []string{"timeout", "grace", "offset", "length", "depth"} {
		refine(s, name, func(s *schema) { s.Minimum = new(0) })
	}
	refine(s, "pid", func(s *schema) { s.Minimum = new(1) })
	refine(s, "encoding", func(s *schema) { s.Enum = []string{string(rpc.EncodingUTF8), string(rpc.EncodingBase64)} })
	refine(s, "mode", func(s *schema) { s.Pattern = "^[0-7]*$" })
	refineTerminal := func(terminal *schema) {
		for _, name := range []string{"cols", "rows"} {
			refine(*terminal, name, func(s *schema) { s.Minimum, s.Maximum = new(1), new(math.MaxUint16) })
		}
	}
	refine(s, "terminal", refineTerminal)
	refineTerminal(&s)
	refine(s, "limit", func(s *schema) { s.Minimum, s.Maximum = new(1), new(rpc.MaxPage) })
	refine(s, "config", func(config *schema) {
		for _, name := range []string{"cpus", "memory"} {
			refine(*config, name, func(s *schema) { s.Minimum = new(int) })
		}
	})
	return s
}

func schemaOf(t reflect.Type) schema {
	switch t {
	case reflect.TypeFor[time.Time]():
		return schema{Type: "string", Format: "date-time"}
	case reflect.TypeFor[[]byte]():
		return schema{Type: "string", ContentEncoding: "base64"}
	case reflect.TypeFor[jsontext.Value]():
		return schema{}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return schemaOf(t.Elem()).nullable()
	case reflect.Bool:
		return schema{Type: "boolean"}
	case reflect.Int, reflect.Int64:
		return schema{Type: "integer"}
	case reflect.Float64:
		return schema{Type: "number"}
	case reflect.Slice:
		items := schemaOf(t.Elem())
		return schema{Type: "array", Items: &items}
	case reflect.Map:
		return schema{Type: "object", AdditionalProperties: schemaOf(t.Elem())}
	case reflect.Struct:
		return objectOf(membersOf(t))
	default:
		return schema{Type: "string"}
	}
}

// nullable returns a copy of s that also accepts null.
func (s schema) nullable() schema {
	if name, ok := s.Type.(string); ok {
		s.Type = []any{name, "null"}
	}
	return s
}

func objectOf(members []param) schema {
	s := schema{Type: "object", Properties: map[string]schema{}, AdditionalProperties: false}
	for _, m := range members {
		of := schemaOf(m.kind)
		if m.required {
			s.Required = append(s.Required, m.name)
		} else {
			of = of.nullable() // null means the same as leaving it out
		}
		s.Properties[m.name] = of
	}
	return s
}
