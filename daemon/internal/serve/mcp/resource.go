package mcp

import (
	"context"
	"encoding/base64"
	"fmt"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/go-json-experiment/json"
	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/api/rpc"
)

// The parts of the URI of a file in a sandbox. Names are in the path, because some clients change the case of a host.
const (
	uriScheme = "msb"
	uriHost   = "sandboxes"
	uriFiles  = "/files" // after the namespace and the sandbox, before the path of the file
)

// maxResource is the most that a read of a resource returns, in bytes.
const maxResource = 2 << 20

// fileTemplate describes the resources: the files of all sandboxes that the key may use.
var fileTemplate = &sdk.ResourceTemplate{
	Name: "file", Title: "File in a sandbox", URITemplate: uriScheme + "://" + uriHost + "/{namespace}/{sandbox}" + uriFiles + "{+path}{?offset,length}",
	Description: fmt.Sprintf("A file in a sandbox. path is absolute. A read returns at most %d MiB: for a larger file, give an offset and a length in bytes.",
		maxResource>>20),
}

// fileParams are the params of sandbox.fs.read that a URI stands for.
type fileParams struct {
	Sandbox   string       `json:"sandbox"`
	Namespace string       `json:"namespace"`
	Path      string       `json:"path"`
	Encoding  rpc.Encoding `json:"encoding"`
	Offset    int          `json:"offset"`
	Length    int          `json:"length"`
}

// parseFileURI is the reverse of fileURI. If the URI has no length, Length is one byte more than maxResource.
func parseFileURI(uri string) (p fileParams, ok bool) {
	u, err := url.Parse(uri)
	if err != nil || u.Scheme != uriScheme || u.Host != uriHost || u.User != nil || u.Fragment != "" {
		return p, false
	}
	parts := strings.SplitN(u.Path, "/", 5) // the first one is empty
	query, err := url.ParseQuery(u.RawQuery)
	if len(parts) != 5 || "/"+parts[3] != uriFiles || err != nil || !utf8.ValidString(u.Path) {
		return p, false
	}
	p = fileParams{Namespace: parts[1], Sandbox: parts[2], Path: "/" + parts[4], Encoding: rpc.EncodingBase64, Length: maxResource + 1}
	for name, values := range query {
		number, err := strconv.Atoi(values[0])
		if len(values) > 1 || err != nil || number < 0 {
			return p, false
		}
		switch name {
		case "offset":
			p.Offset = number
		case "length":
			p.Length = min(number, maxResource+1)
		default:
			return p, false
		}
	}
	return p, true
}

// readResource returns a file of a sandbox, or a part of it.
func (h *Handler) readResource(ctx context.Context, req *sdk.ReadResourceRequest) (*sdk.ReadResourceResult, error) {
	uri := req.Params.URI
	p, ok := parseFileURI(uri)
	if !ok {
		return nil, &jsonrpc.Error{Code: jsonrpc.CodeInvalidParams, Message: "the URI does not have the form " + fileTemplate.URITemplate}
	}
	c, end, err := h.begin(ctx, arguments{})
	if err != nil {
		return nil, fmt.Errorf("read resource: %w", err)
	}
	defer end()
	params, err := json.Marshal(p)
	if err != nil {
		return nil, err
	}
	content, size, rpcErr := c.readBytes(params)
	switch {
	case rpcErr != nil && rpcErr.Code == rpc.CodeNotFound:
		return nil, &jsonrpc.Error{Code: jsonrpc.CodeInvalidParams, Message: rpcErr.Message}
	case rpcErr != nil:
		return nil, &jsonrpc.Error{Code: int64(rpcErr.Code), Message: rpcErr.Message}
	case len(content) > maxResource:
		return nil, &jsonrpc.Error{Code: int64(rpc.CodeConflict), Message: fmt.Sprintf("the file has %d bytes, and a read returns at most %d; "+
			"read a part of it: add ?offset=0&length=%[2]d to the URI", size, maxResource)}
	}
	contents, encoded := &sdk.ResourceContents{URI: uri}, 0
	if text := string(content); text != "" && utf8.ValidString(text) && !strings.Contains(text, "\x00") {
		contents.Text, contents.MIMEType = text, "text/plain"
		encoded = encodedSize(text)
	} else { // also if it is empty, because the library leaves out a text that is empty
		contents.Blob, contents.MIMEType = content, http.DetectContentType(content)
		encoded = base64.StdEncoding.EncodedLen(len(content))
	}
	if rpcErr := c.hold(encodedCopies * encoded); rpcErr != nil {
		return nil, &jsonrpc.Error{Code: int64(rpcErr.Code), Message: rpcErr.Message}
	}
	return &sdk.ReadResourceResult{Contents: []*sdk.ResourceContents{contents}}, nil
}

// encodedSize returns about how many bytes a text takes in JSON that the library writes.
func encodedSize(text string) int {
	size := len(text)
	for _, c := range []byte(text) {
		switch {
		case c < ' ', c == '<', c == '>', c == '&':
			size += len(`\u0000`) - 1
		case c == '"', c == '\\':
			size++
		}
	}
	return size
}
