package mcp

import (
	"context"
	"fmt"

	"github.com/modelcontextprotocol/go-sdk/jsonrpc"
	sdk "github.com/modelcontextprotocol/go-sdk/mcp"

	"github.com/msbd/msbd/daemon/internal/domain/name"
	"github.com/msbd/msbd/daemon/internal/serve/rpcerr"
)

// prompt asks a model to create a sandbox for a language.
type prompt struct {
	name, language, image, code string
}

var prompts = []prompt{
	{"create_python_sandbox", "Python", "microsandbox/python", "python"},
	{"create_node_sandbox", "Node.js", "microsandbox/node", "node"},
}

const sandboxName = "sandbox_name"

func (p prompt) describe() *sdk.Prompt {
	return &sdk.Prompt{
		Name: p.name, Title: "Create a " + p.language + " sandbox", Description: "Start a " + p.language + " sandbox and test it",
		Arguments: []*sdk.PromptArgument{{Name: sandboxName, Description: "name of the sandbox: " + nameRule, Required: true}},
	}
}

func (p prompt) get(_ context.Context, req *sdk.GetPromptRequest) (*sdk.GetPromptResult, error) {
	sandbox, given := req.Params.Arguments[sandboxName]
	if !given {
		return nil, &jsonrpc.Error{Code: jsonrpc.CodeInvalidParams, Message: "the argument " + sandboxName + " is required"}
	}
	// Refuse anything but a valid name, because the text below is an instruction to a model.
	if err := name.Validate(sandboxName, sandbox); err != nil {
		return nil, &jsonrpc.Error{Code: jsonrpc.CodeInvalidParams, Message: rpcerr.Message(err)}
	}
	text := fmt.Sprintf("Create a %s sandbox: call sandbox_start with sandbox %q and config {\"image\": %q}. Then run a line of %[1]s code in it with "+
		"sandbox_run_code and language %[4]q to check that it works. Stop it with sandbox_stop when it is no longer needed.", p.language, sandbox, p.image, p.code)
	return &sdk.GetPromptResult{
		Description: "Create the " + p.language + " sandbox " + sandbox,
		Messages:    []*sdk.PromptMessage{{Role: "user", Content: &sdk.TextContent{Text: text}}},
	}, nil
}
