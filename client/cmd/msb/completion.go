package main

import (
	"cmp"
	"context"
	"embed"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	adminv1 "github.com/msbd/msbd/api/msb/admin/v1"
	"github.com/msbd/msbd/client"
)

var completionCommand = &cli.Command{
	Name:      "completion",
	Usage:     "print a completion script for a shell",
	UsageText: "msb completion [bash|zsh|fish]",
	Description: "Without an argument, msb uses the name of the shell in the variable SHELL.\n\n" +
		"bash: source <(msb completion bash), or install it for all users:\n" +
		"      msb completion bash >/usr/share/bash-completion/completions/msb\n" +
		"zsh:  msb completion zsh >\"${fpath[1]}/_msb\"\n" +
		"fish: msb completion fish >~/.config/fish/completions/msb.fish",
	Action: printCompletion,
}

//go:embed completion
var completionScripts embed.FS

func printCompletion(c *cli.Context) error {
	shell := c.Args().First()
	if c.NArg() == 0 {
		shell = os.Getenv("SHELL") // a path
	}
	if c.NArg() > 1 || shell == "" {
		return usageError(c, "give one shell: bash, zsh or fish")
	}
	script, err := completionScripts.ReadFile("completion/" + filepath.Base(shell))
	if err != nil {
		return usageError(c, "unknown shell %q: use bash, zsh or fish", shell)
	}
	_, err = c.App.Writer.Write(script)
	return err
}

// completeCommand is called by the completion scripts. Its arguments are the words of a command line up to and
// including the one that is being completed. It prints one candidate per line, with a description after a tab. If it
// prints nothing, the shell completes file names.
var completeCommand = &cli.Command{
	Name:            "__complete",
	Hidden:          true,
	SkipFlagParsing: true,
	Action: func(c *cli.Context) error {
		list := c.Args().Slice()
		if len(list) == 0 {
			return nil
		}
		last := list[len(list)-1]
		for _, candidate := range candidates(c, list[:len(list)-1], last) {
			if strings.HasPrefix(candidate[0], last) {
				fmt.Fprintf(c.App.Writer, "%s\t%s\n", candidate[0], printable(candidate[1]))
			}
		}
		return nil
	},
}

// The completers return candidates for the arguments of a command and for the values of a flag. Some ask the server.
var (
	argumentCompleters = map[*cli.Command]completer{
		keyShow: keyNames, keyRevoke: keyNames, keyRotate: keyNames, serverStatus: sandboxNames,
		sandboxRun: ownSandboxNames, sandboxExec: ownSandboxNames, sandboxStop: ownSandboxNames, sandboxMetrics: ownSandboxNames,
		sandboxInspect: ownSandboxNames, sandboxShell: ownSandboxNames, sandboxRepl: ownSandboxNames, sandboxForward: ownSandboxNames,
		processList: ownSandboxNames, processLogs: processNames, processKill: processNames, sandboxCp: remotePaths, imageRm: imageNames,
		mcpConfig: words("claude", "cursor", "vscode"), completionCommand: words("bash", "zsh", "fish"),
	}
	valueCompleters = map[cli.Flag]completer{
		scopeFlag: func(*completion) [][2]string { return scopes }, languageFlag: words("python", "node", "bash"), imageFlag: imageNames,
	}
	// severalArguments are the commands whose completers are for all arguments, not only for the first one.
	severalArguments = []*cli.Command{keyRevoke, serverStatus, sandboxStop, processLogs, processKill, sandboxCp, imageRm}
)

type completer func(*completion) [][2]string

// completion is what completers may use.
type completion struct {
	ctx   context.Context
	line  *commandLine
	admin *client.Admin
}

// words returns a completer for a fixed list.
func words(list ...string) completer {
	return func(*completion) (out [][2]string) {
		for _, word := range list {
			out = append(out, [2]string{word, ""})
		}
		return out
	}
}

// completionTimeout limits the request to the server. It is short, because the user is waiting at the prompt.
const completionTimeout = 2 * time.Second

func candidates(c *cli.Context, before []string, last string) (list [][2]string) {
	line := parseWords(c.App, before)
	complete := argumentCompleters[line.command]
	if len(line.arguments) > 0 && !slices.Contains(severalArguments, line.command) {
		complete = nil
	}
	switch {
	case line.pending != nil:
		complete = valueCompleters[line.pending]
	case strings.HasPrefix(last, "-") && !line.flagsEnded:
		for _, f := range line.command.VisibleFlags() {
			name := "--" + f.Names()[0]
			_, repeatable := f.(*cli.StringSliceFlag)
			if given := slices.ContainsFunc(line.flags, func(word string) bool { return findFlag(line.command, word) == f }); !given || repeatable {
				list = append(list, [2]string{name, strings.ReplaceAll(f.(cli.DocGenerationFlag).GetUsage(), "`", "")})
			}
		}
		return list
	case len(line.arguments) == 0:
		for _, sub := range line.command.Subcommands {
			if !sub.Hidden {
				list = append(list, [2]string{sub.Name, sub.Usage})
			}
		}
		if len(line.before) == 0 { // see findCommand
			for _, sub := range sandboxCommands.Subcommands {
				list = append(list, [2]string{sub.Name, sub.Usage})
			}
		}
	}
	if complete == nil {
		return list
	}
	ctx, cancel := context.WithTimeout(c.Context, completionTimeout)
	defer cancel()
	a := &client.Admin{Socket: cmp.Or(socketOf(line), c.String(socketFlag))}
	defer a.Close()
	return append(list, complete(&completion{ctx, line, a})...)
}

// socketOf returns the value of --socket in a command line, or "".
func socketOf(line *commandLine) string { return valueIn(line.before, "--"+socketFlag) }

// valueIn returns the last value of a flag among words, or "". The flag is given with its dashes, in each of its forms.
func valueIn(words []string, forms ...string) (value string) {
	for i, word := range words {
		for _, form := range forms {
			if v, ok := strings.CutPrefix(word, form+"="); ok {
				value = v
			} else if word == form && i+1 < len(words) {
				value = words[i+1]
			}
		}
	}
	return value
}

// keyNames returns the names of live keys, each once, and the ids of those without a name.
func keyNames(c *completion) (list [][2]string) {
	seen := map[string]bool{} // a rotated key and its replacement have the same name
	for key, err := range c.admin.Keys(c.ctx, &adminv1.ListKeysRequest{State: adminv1.KeyState_KEY_STATE_LIVE}) {
		if err != nil {
			break // a completion cannot report errors
		}
		switch name := key.GetName(); {
		case name == "":
			list = append(list, [2]string{shortID(key), validIn(key)})
		case !seen[name]:
			list, seen[name] = append(list, [2]string{name, shortID(key)}), true
		}
	}
	return list
}

func sandboxNames(c *completion) (list [][2]string) {
	sandboxes, _ := c.admin.Sandboxes(c.ctx, "")
	for _, s := range sandboxes {
		list = append(list, [2]string{s.GetName(), s.GetNamespace() + ", " + s.GetState()})
	}
	return list
}

// ownSandboxNames returns the sandboxes of the API key, in the namespace of the command line.
func ownSandboxNames(c *completion) (list [][2]string) {
	server, namespace := c.server()
	if server == nil {
		return nil
	}
	sandboxes, _ := server.ListSandboxes(c.ctx, namespace)
	for _, s := range sandboxes {
		list = append(list, [2]string{s.Name, s.Namespace + ", " + string(s.State)})
	}
	return list
}

// server returns the server and the namespace of the command line. The server is nil if there is none.
func (c *completion) server() (*client.Client, string) {
	config, err := client.LoadConfig(valueIn(c.line.flags, "--"+serverURLFlag.Name))
	if err != nil {
		return nil, ""
	}
	return config.Client(), valueIn(c.line.flags, "--"+namespaceFlag.Name, "-n")
}

// processNames returns the sandboxes, and after one of them its processes.
func processNames(c *completion) (list [][2]string) {
	if len(c.line.arguments) == 0 {
		return ownSandboxNames(c)
	}
	server, namespace := c.server()
	if server == nil || len(c.line.arguments) > 1 {
		return nil
	}
	processes, _ := server.Sandbox(namespace, c.line.arguments[0]).Processes(c.ctx)
	for _, p := range processes {
		list = append(list, [2]string{strconv.Itoa(p.PID), processState(p) + ", " + oneLine(p.Command+" "+p.Tag)})
	}
	return list
}

// remotePaths returns the sandboxes, each with a colon. The shell completes the names of local files.
func remotePaths(c *completion) (list [][2]string) {
	for _, s := range ownSandboxNames(c) {
		list = append(list, [2]string{s[0] + ":", s[1]})
	}
	return list
}

// imageNames returns the server's images, or, if only administrators may list them, those that every server has.
func imageNames(c *completion) (list [][2]string) {
	images, err := c.admin.Images(c.ctx)
	if err != nil {
		return words("microsandbox/python", "microsandbox/node")(c)
	}
	for _, i := range images {
		list = append(list, [2]string{i.GetName(), size(i.GetSizeBytes())})
	}
	return list
}
