package client

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"

	"github.com/go-json-experiment/json"
	"github.com/go-json-experiment/json/jsontext"

	"github.com/msbd/msbd/api/rpc"
)

// MCP posts one message of the Model Context Protocol, in JSON, and returns the answer, whose Body the caller
// closes. It is for those that pass messages on: what they say, and which headers belong to it, is theirs.
//
// An answer to the message is no error, whatever its status. That the request was refused as a whole is an
// [*Error]. The message is sent once.
func (c *Client) MCP(ctx context.Context, message []byte, header http.Header) (*http.Response, error) {
	req, err := c.newRequest(ctx, http.MethodPost, rpc.MCPPath, message)
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
		return nil, fmt.Errorf("send an MCP message: %w", c.explain(ctx, err))
	}
	if res.StatusCode/100 == 2 {
		return res, nil
	}
	defer res.Body.Close()
	a := &answer{status: res.StatusCode, header: res.Header}
	if a.body, err = io.ReadAll(io.LimitReader(res.Body, maxAnswer)); err != nil {
		return nil, fmt.Errorf("send an MCP message: %w", c.explain(ctx, err))
	}
	var told struct {
		ID jsontext.Value `json:"id"`
	}
	if json.Unmarshal(a.body, &told) == nil && told.ID != nil && told.ID.Kind() != 'n' {
		res.Body = io.NopCloser(bytes.NewReader(a.body))
		return res, nil
	}
	if _, err := a.result(); err != nil {
		return nil, err
	}
	return nil, a.foreign()
}
