package client

import (
	"bytes"
	"context"
	"io"
	"net/http"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
)

// MCP posts a message of the Model Context Protocol, in JSON, and returns the response. The caller must close
// its Body. MCP is for programs that forward messages: they provide the message and the headers that belong to
// it.
//
// A response that answers the message is not an error, whatever its status. If the server refused the HTTP
// request itself, the error is an [*Error]. The message is sent once, without retries.
func (c *Client) MCP(ctx context.Context, message []byte, header http.Header) (*http.Response, error) {
	req, err := c.newRequest(ctx, http.MethodPost, rpc.MCPPath, bytes.NewReader(message))
	if err != nil {
		return nil, err
	}
	for name, values := range header {
		req.Header[name] = values
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Accept", "application/json, text/event-stream")
	if err := c.authorize(req); err != nil {
		return nil, err
	}
	res, err := c.http().Do(req)
	if err != nil {
		return nil, c.explain(ctx, err)
	}
	if res.StatusCode/100 == 2 {
		return res, nil
	}
	defer res.Body.Close()
	r := &response{status: res.StatusCode, header: res.Header}
	if r.body, err = io.ReadAll(io.LimitReader(res.Body, maxResponse)); err != nil {
		return nil, c.explain(ctx, err)
	}
	// A response with an id answers the message.
	var reply struct {
		ID jsontext.Value `json:"id"`
	}
	if json.Unmarshal(r.body, &reply) == nil && reply.ID != nil && reply.ID.Kind() != 'n' {
		res.Body = io.NopCloser(bytes.NewReader(r.body))
		return res, nil
	}
	if _, err := r.result(); err != nil {
		return nil, err
	}
	return nil, r.unexpected()
}
