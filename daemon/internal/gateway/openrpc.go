package gateway

import (
	"reflect"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"
)

// document is an OpenRPC description of a table of methods.
type document struct {
	OpenRPC string       `json:"openrpc"`
	Info    info         `json:"info"`
	Methods []methodInfo `json:"methods"`
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
	AdditionalProperties any               `json:"additionalProperties,omitzero"` // a schema or false
}

// describe makes the answer to rpc.discover from the types of the table.
func describe(table []method) jsontext.Value {
	doc := document{OpenRPC: "1.3.2", Info: info{Title: "msbd", Version: "1"}}
	for _, m := range table {
		mi := methodInfo{Name: m.name, ParamStructure: "either", Result: value{Name: "result", Schema: schemaOf(m.result)}}
		for _, p := range m.params {
			mi.Params = append(mi.Params, value{Name: p.name, Required: p.required, Schema: schemaOf(p.kind)})
		}
		doc.Methods = append(doc.Methods, mi)
	}
	b, err := json.Marshal(doc, json.Deterministic(true))
	if err != nil {
		panic(err) // made of our own types alone
	}
	return b
}

func schemaOf(t reflect.Type) schema {
	switch t.Kind() {
	case reflect.Pointer:
		s := schemaOf(t.Elem())
		s.Type = []any{s.Type, "null"}
		return s
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
		s := schema{Type: "object", Properties: map[string]schema{}, AdditionalProperties: false}
		for _, m := range membersOf(t) {
			s.Properties[m.name] = schemaOf(m.kind)
			if m.required {
				s.Required = append(s.Required, m.name)
			}
		}
		return s
	default:
		return schema{Type: "string"}
	}
}
