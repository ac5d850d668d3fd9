package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

var mcpConfig = &cli.Command{
	Name:      "config",
	Usage:     "print the configuration for an AI assistant",
	UsageText: "msb mcp config [options] claude|cursor|vscode",
	Description: "claude: claude_desktop_config.json (Settings, Developer, Edit Config)\n" +
		"cursor: ~/.cursor/mcp.json\n" +
		"vscode: .vscode/mcp.json (VS Code asks for the key once and stores it securely)\n\n" +
		"Replace " + keyPlaceholder + " with your API key. msb never prints the key itself.",
	Flags: []cli.Flag{serverURLFlag},
	Action: func(c *cli.Context) error {
		if c.NArg() != 1 {
			return usageError(c, "give one assistant: claude, cursor or vscode")
		}
		settings, ok := assistants[c.Args().First()]
		if !ok {
			return usageError(c, "unknown assistant %q: use claude, cursor or vscode", c.Args().First())
		}
		// Assistants with a window do not have the PATH of a shell.
		program, err := os.Executable()
		if err != nil {
			return fmt.Errorf("find the path of msb: %w", err)
		}
		config, err := client.LoadConfig(c.String(serverURLFlag.Name))
		if err != nil {
			return err
		}
		out := json.NewEncoder(c.App.Writer)
		out.SetIndent("", "  ")
		out.SetEscapeHTML(false)
		return out.Encode(settings(program, config.ServerURL))
	},
}

const keyPlaceholder = "your-api-key-here"

// object is a JSON object.
type object = map[string]any

// assistants maps each assistant to a function that returns its settings for the path of msb and a server's URL.
var assistants = map[string]func(program, url string) object{
	"claude": mcpServers,
	"cursor": mcpServers,
	"vscode": func(program, url string) object {
		const input = "msb-api-key"
		server := serverEntry(program, url, "${input:"+input+"}")
		server["type"] = "stdio"
		return object{
			"inputs":  []object{{"type": "promptString", "id": input, "description": "API key of " + url, "password": true}},
			"servers": object{"msbd": server},
		}
	},
}

func mcpServers(program, url string) object {
	return object{"mcpServers": object{"msbd": serverEntry(program, url, keyPlaceholder)}}
}

// serverEntry returns the settings with which an assistant starts msb mcp.
func serverEntry(program, url, key string) object {
	return object{"command": program, "args": []string{"mcp"}, "env": object{client.EnvServerURL: url, client.EnvAPIKey: key}}
}
