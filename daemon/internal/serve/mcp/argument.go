package mcp

import (
	"encoding/json"
	"fmt"
	"maps"

	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
)

// number is an integer argument that a tool has beside the params of its method.
type number struct {
	name      string
	min, max  int
	otherwise int  // its value if the model does not give it
	hidden    bool // whether otherwise is not a value that a model can give
}

var (
	// The output of a run is limited for the model's sake. A call can choose another limit, in bytes.
	maxOutput = number{name: "max_output_bytes", min: 1, max: 200_000, otherwise: 50_000}
	// fileLength limits the part of a file that a call reads.
	fileLength = number{name: "length", min: 1, max: 200_000, otherwise: 50_000}
	// position is where to begin with the output of a process.
	position = number{name: "offset", min: 0, max: 1<<53 - 1, otherwise: -1, hidden: true}
	// waitFor is how long to wait for the end of a process, in seconds.
	waitFor = number{name: "wait", min: 0, max: 300}
)

func (n number) schema() map[string]any {
	s := map[string]any{"type": []string{"integer", "null"}, "minimum": n.min, "maximum": n.max}
	if !n.hidden {
		s["default"] = n.otherwise
	}
	return s
}

// arguments are the arguments of a tool call.
type arguments struct {
	text    jsontext.Value
	members map[string]json.RawMessage // nil if text is not an object
}

// parseArguments returns the arguments of a call. text may be empty or null.
func parseArguments(text jsontext.Value) arguments {
	if len(text) == 0 || text.Kind() == 'n' {
		text = jsontext.Value("{}")
	}
	a := arguments{text: text}
	_ = json.Unmarshal(text, &a.members) // the method refuses what is not an object
	return a
}

// take removes the argument n and returns its value.
func (a arguments) take(n number) (value int, rpcErr *rpc.Error) {
	given, ok := a.members[n.name]
	if !ok {
		return n.otherwise, nil
	}
	delete(a.members, n.name)
	if value = n.otherwise; string(given) == "null" {
		return value, nil
	}
	if json.Unmarshal(given, &value) != nil || value < n.min || value > n.max {
		return 0, &rpc.Error{Code: rpc.CodeInvalidParams, Message: fmt.Sprintf("%s must be an integer from %d to %d", n.name, n.min, n.max)}
	}
	return value, nil
}

// params returns the arguments as params of a method. Those in set are added, or replaced.
func (a arguments) params(set map[string]any) jsontext.Value {
	if a.members == nil {
		return a.text
	}
	members := maps.Clone(a.members)
	for name, value := range set {
		members[name], _ = json.Marshal(value) // set has only strings, numbers and booleans
	}
	params, _ := json.Marshal(members)
	return params
}
