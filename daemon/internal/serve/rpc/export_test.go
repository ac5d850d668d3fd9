package rpc

import "github.com/msbd/msbd/daemon/internal/domain/keys"

// The external tests need these; unlike tests in this package, they can import servetest.
type (
	Document = document
	Schema   = schema
)

// Method describes an entry of the table of methods.
type Method struct {
	Name  string
	Scope keys.Scope
	// Required are the names of the required params.
	Required []string
	Params   []string
	// Schema is the schema of the params.
	Schema schema
	// OnlyEvents means that the method responds only with a stream of events.
	OnlyEvents bool
}

func (s *Service) Table() (all []Method) {
	for _, m := range s.table {
		method := Method{Name: m.name, Scope: m.scope, Schema: m.paramsSchema(), OnlyEvents: m.events == requiredEvents}
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

// IndexWithoutScope indexes a table with a method that has no scope.
func IndexWithoutScope() error {
	_, err := index([]method{define("sandbox.open", "", (&Service{}).stop)})
	return err
}

var Depth = depth
