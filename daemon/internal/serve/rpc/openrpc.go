package rpc

import (
	"maps"
	"reflect"
	"slices"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/domain/keys"
	"github.com/msbd/msbd/daemon/internal/domain/name"
)

// document is an OpenRPC description of a table of methods.
type document struct {
	OpenRPC    string       `json:"openrpc"`
	Info       info         `json:"info"`
	Methods    []methodInfo `json:"methods"`
	Components components   `json:"components"`
}

type components struct {
	Errors map[string]errorInfo `json:"errors"`
}

// errorInfo says in its data what the caller can do.
type errorInfo struct {
	Code    rpc.Code `json:"code"`
	Message string   `json:"message"`
	Data    string   `json:"data"`
}

type reference struct {
	Ref string `json:"$ref"`
}

type info struct {
	Title   string `json:"title"`
	Version string `json:"version"`
}

type methodInfo struct {
	Name           string  `json:"name"`
	ParamStructure string  `json:"paramStructure"`
	Params         []value `json:"params"`
	Result         value   `json:"result"`
	// Errors may each come of it.
	Errors []reference `json:"errors"`
	// Scope is what a key needs for it: an extension, as OpenRPC calls that.
	Scope keys.Scope `json:"x-scope"`
}

type value struct {
	Name     string `json:"name"`
	Required bool   `json:"required,omitzero"`
	Schema   schema `json:"schema"`
}

// schema is the part of JSON Schema in which the types of api/rpc can be said.
type schema struct {
	Type                 any               `json:"type"` // a name, or two of which one is null
	Properties           map[string]schema `json:"properties,omitzero"`
	Required             []string          `json:"required,omitzero"`
	Items                *schema           `json:"items,omitzero"`
	Enum                 []string          `json:"enum,omitzero"`
	Pattern              string            `json:"pattern,omitzero"`
	MinLength            int               `json:"minLength,omitzero"`
	Minimum              *int              `json:"minimum,omitzero"`
	AdditionalProperties any               `json:"additionalProperties,omitzero"` // a schema or false
}

// describe makes the answer to rpc.discover from the types of the table.
func describe(table []method) jsontext.Value {
	doc := document{
		OpenRPC: "1.3.2", Info: info{Title: "msbd", Version: "1"},
		Components: components{Errors: map[string]errorInfo{}},
	}
	var errs []reference
	for _, c := range rpc.Codes {
		doc.Components.Errors[c.Name] = errorInfo{Code: c.Code, Message: c.Meaning, Data: c.Remedy}
		errs = append(errs, reference{"#/components/errors/" + c.Name})
	}
	for _, m := range table {
		mi := methodInfo{
			Name: m.name, ParamStructure: "either", Errors: errs, Scope: m.scope,
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

// encode writes a description, always in the same order.
func encode(description any) jsontext.Value {
	b, err := json.Marshal(description, json.Deterministic(true))
	if err != nil {
		panic(err) // made of our own types alone
	}
	return b
}

// paramsSchema is that of params by name, with what handlers check beyond the types.
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
		if s.Pattern = name.Pattern; m.anywhere {
			s.Pattern += `|^\*$`
		}
	})
	refine(s, "language", func(s *schema) { s.Enum = slices.Sorted(maps.Keys(languages)) })
	refine(s, "command", func(s *schema) { s.MinLength = 1 })
	refine(s, "timeout", func(s *schema) { s.Minimum = new(int) })
	refine(s, "config", func(config *schema) {
		for _, name := range []string{"cpus", "memory"} {
			refine(*config, name, func(s *schema) { s.Minimum = new(int) })
		}
	})
	return s
}

func schemaOf(t reflect.Type) schema {
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

// nullable returns a schema that also takes null.
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
			of = of.nullable() // as if it were left out
		}
		s.Properties[m.name] = of
	}
	return s
}
