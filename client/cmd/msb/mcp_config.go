package main

import (
	"encoding/json"

	"github.com/urfave/cli/v2"

	"github.com/msbd/msbd/client"
)

var mcpConfig = &cli.Command{
	Name:      "config",
	Usage:     "print what to put into an assistant's settings",
	UsageText: "msb mcp config claude|cursor|vscode",
	Description: "claude: claude_desktop_config.json (Settings, Developer, Edit Config)\n" +
		"cursor: ~/.cursor/mcp.json\n" +
		"vscode: .vscode/mcp.json, which asks for the key once and keeps it safe\n\n" +
		"Put your API key where it says " + keyPlaceholder + ". The key itself is never printed.",
	Flags: []cli.Flag{serverURLFlag},
	Action: func(c *cli.Context) error {
		if c.NArg() != 1 {
			return usage(c, "name one assistant: claude, cursor or vscode")
		}
		make, ok := assistants[c.Args().First()]
		if !ok {
			return usage(c, "unknown assistant %q: name claude, cursor or vscode", c.Args().First())
		}
		config, err := client.LoadConfig(c.String(serverURLFlag.Name))
		if err != nil {
			return err
		}
		out := json.NewEncoder(c.App.Writer)
		out.SetIndent("", "  ")
		out.SetEscapeHTML(false)
		return out.Encode(make(config.ServerURL))
	},
}

const keyPlaceholder = "your-api-key-here"

// object is one of JSON.
type object = map[string]any

// assistants make the settings of each, for a server's URL.
var assistants = map[string]func(url string) object{
	"claude": mcpServers,
	"cursor": mcpServers,
	"vscode": func(url string) object {
		const input = "msb-api-key"
		server := launch(url, "${input:"+input+"}")
		server["type"] = "stdio"
		return object{
			"inputs":  []object{{"type": "promptString", "id": input, "description": "API key of " + url, "password": true}},
			"servers": object{"msbd": server},
		}
	},
}

func mcpServers(url string) object {
	return object{"mcpServers": object{"msbd": launch(url, keyPlaceholder)}}
}

// launch is how an assistant starts the bridge.
func launch(url, key string) object {
	return object{"command": "msb", "args": []string{"mcp"}, "env": object{client.EnvServerURL: url, client.EnvAPIKey: key}}
}
