package mcp

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"net/url"
	"path"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/api/rpc"
	"github.com/msbd/msbd/daemon/internal/serve/wire"
)

// runCode runs code. The text of the values that it shows is a part of the output, and its images follow.
func runCode(c *call) (*sdk.CallToolResult, *rpc.Error) {
	result, file, rpcErr := c.excerpt(rpc.MethodSandboxReplRun, map[string]any{"results": true})
	if rpcErr != nil {
		return c.fileLink(file), rpcErr
	}
	run := decode[rpc.ReplRunResult](result)
	note := ""
	if run.Status != rpc.StatusSuccess {
		note = "(the code failed)"
	}
	res, rpcErr := c.runResult(linesText(run.Output, note), map[string]any{"status": run.Status})
	if rpcErr != nil {
		return nil, rpcErr
	}
	for _, display := range run.Results {
		for format, image := range display.Data {
			res.Content = append(res.Content, imageContent(format, image))
		}
	}
	res.Content = append(res.Content, c.fileLink(file).Content...)
	return res, nil
}

func runCommand(c *call) (*sdk.CallToolResult, *rpc.Error) {
	result, file, rpcErr := c.excerpt(rpc.MethodSandboxCommandRun, nil)
	if rpcErr != nil {
		return c.fileLink(file), rpcErr
	}
	run := decode[rpc.CommandRunResult](result)
	note := ""
	if !run.Success {
		note = fmt.Sprintf("(exit code %d)", run.ExitCode)
	}
	res, rpcErr := c.runResult(linesText(run.Output, note), map[string]any{"exit_code": run.ExitCode, "success": run.Success})
	if rpcErr != nil {
		return nil, rpcErr
	}
	res.Content = append(res.Content, c.fileLink(file).Content...)
	return res, nil
}

// excerpt calls a method that runs something. It returns the file that has all of the output if the result lacks something.
func (c *call) excerpt(method string, set map[string]any) (result jsontext.Value, file *wire.OutputFile, rpcErr *rpc.Error) {
	bytes, rpcErr := c.take(maxOutput)
	if rpcErr != nil {
		return nil, nil, rpcErr
	}
	e := &wire.Excerpt{Bytes: bytes}
	result, rpcErr = c.invoke(method, c.params(set), e)
	return result, e.File, rpcErr
}

// runResult is textResult for a run, which cannot be repeated if there is no room for its output.
func (c *call) runResult(text string, meta any) (*sdk.CallToolResult, *rpc.Error) {
	res, rpcErr := c.textResult(meta, text)
	if rpcErr != nil {
		return nil, &rpc.Error{Code: rpcErr.Code, Message: "the run has ended, but there is no room for its output, because other responses are pending; " +
			"print less, write to a file, or send fewer requests at a time"}
	}
	return res, nil
}

// imageContent returns an image that code has shown, as content for the model.
func imageContent(format string, image jsontext.Value) sdk.Content {
	var encoded string
	_ = json.Unmarshal(image, &encoded) // if it is not a string, it is empty
	data, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil || len(data) == 0 {
		return &sdk.TextContent{Text: "(the code has shown an " + format + " that is not base64)"}
	}
	return &sdk.ImageContent{Data: data, MIMEType: format}
}

// resourceLinks is the first revision of the protocol that has links to resources in results.
const resourceLinks = "2025-06-18"

// fileLink returns the link to a file with the output of a run as a result, which is empty if there is no file or no such link
// in the client's revision. The model can always read the file: its path is in the text.
func (c *call) fileLink(file *wire.OutputFile) *sdk.CallToolResult {
	res := &sdk.CallToolResult{}
	if file != nil && c.request.revision >= resourceLinks {
		res.Content = append(res.Content, &sdk.ResourceLink{
			URI: fileURI(file.Namespace, file.Sandbox, file.Path), Name: path.Base(file.Path), Title: "Complete output of the run",
			MIMEType: "text/plain", Size: new(int64(file.Size)),
		})
	}
	return res
}

// fileURI returns the URI of a file as a resource.
func fileURI(namespace, sandbox, path string) string {
	return (&url.URL{Scheme: uriScheme, Host: uriHost, Path: "/" + namespace + "/" + sandbox + uriFiles + path}).String()
}

// linesText returns the output as a terminal shows it, followed by the line note unless that is empty.
func linesText(output []rpc.Line, note string) string {
	var lines []string
	for _, l := range output {
		lines = append(lines, l.Text)
	}
	if note != "" {
		lines = append(lines, note)
	}
	if lines == nil {
		return "(no output)"
	}
	return strings.Join(lines, "\n")
}
