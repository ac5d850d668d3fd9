package rpc

import "github.com/msbd/msbd/daemon/internal/domain/keys"

// What tests of the package from outside need, which can use the sites of servetest.
type (
	Document = document
	Schema   = schema
)

// Method is an entry of the table.
type Method struct {
	Name  string
	Scope keys.Scope
	// Required are the names of the params that must be given.
	Required []string
	Params   []string
	// Schema is that of the params.
	Schema schema
}

func (s *Service) Table() (all []Method) {
	for _, m := range s.table {
		method := Method{Name: m.name, Scope: m.scope, Schema: m.paramsSchema()}
		for _, p := range m.params {
			method.Params = append(method.Params, p.name)
			if p.required {
				method.Required = append(method.Required, p.name)
			}
		}
		all = append(all, method)
	}
	return all
}

// IndexWithoutScope declares a method that anyone could call.
func IndexWithoutScope() error {
	_, err := index([]method{define("sandbox.open", "", (&Service{}).stop)})
	return err
}

var Depth = depth
