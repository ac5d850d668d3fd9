package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
	"github.com/xrash/smetrics"
)

// commandLine is a parsed command line.
type commandLine struct {
	before     []string     // the words up to and including the name of the command
	command    *cli.Command // a command with all top-level commands as subcommands, if the line names none
	flags      []string     // the command's flags, each followed by its value
	pending    cli.Flag     // the last flag, if its value is missing
	arguments  []string
	flagsEnded bool // there was a "--": all later words are arguments
}

// passesThrough is true for commands whose arguments contain the command line of another program: after the first
// argument, no word is a flag of msb.
var passesThrough = map[*cli.Command]bool{sandboxExec: true}

// parseWords parses the words after the name of the program.
func parseWords(app *cli.App, words []string) *commandLine {
	line := &commandLine{command: &cli.Command{Flags: app.Flags, Subcommands: app.Commands}}
	for _, word := range words {
		switch {
		case line.pending != nil:
			line.flags, line.pending = append(line.flags, word), nil
		case line.flagsEnded || passesThrough[line.command] && len(line.arguments) > 0:
			line.arguments = append(line.arguments, word)
		case word == "--":
			line.flagsEnded = true
		case strings.HasPrefix(word, "-") && word != "-":
			line.flags = append(line.flags, word)
			if f := findFlag(line.command, word); f != nil && !strings.Contains(word, "=") && takesValue(f) {
				line.pending = f
			}
		default:
			path := findCommand(line.command, word)
			if path == nil || len(line.arguments) > 0 {
				line.arguments = append(line.arguments, word)
				continue
			}
			line.before, line.flags = slices.Concat(line.before, line.flags), nil
			for _, c := range path {
				line.before, line.command = append(line.before, c.Name), c
			}
		}
	}
	return line
}

// findCommand returns the subcommand that a word names, or nil. Besides the command's own subcommands, at the top level
// these are the ones of sandbox, so that 'msb run' is short for 'msb sandbox run'. The result then has both commands.
func findCommand(command *cli.Command, word string) (path []*cli.Command) {
	if sub := command.Command(word); sub != nil {
		return []*cli.Command{sub}
	}
	if sandbox := command.Command(sandboxCommands.Name); sandbox != nil {
		if sub := sandbox.Command(word); sub != nil {
			return []*cli.Command{sandbox, sub}
		}
	}
	return nil
}

// suggestion returns a hint for a word that is none of the names, if one of them is similar to it, or "".
func suggestion(word string, names []string) string {
	const similar = 2 // letters to insert or delete, such as those of a swapped pair
	best, closest := similar+1, ""
	for _, name := range names {
		if changes := smetrics.WagnerFischer(name, word, 1, 1, 2); changes < best {
			best, closest = changes, name
		}
	}
	if closest == "" {
		return ""
	}
	return fmt.Sprintf(" (did you mean %q?)", closest)
}

// flagsFirst moves the flags of a command before its arguments, because urfave/cli does not parse flags after an
// argument, but people write them there. It moves --help after the command whose help the user wants, and replaces short forms by the complete names of commands.
func flagsFirst(app *cli.App, args []string) []string {
	line := parseWords(app, args[1:])
	if help := slices.IndexFunc(line.before, isHelp); help >= 0 {
		return slices.Concat(args[:1], slices.Delete(line.before, help, help+1), []string{"--help"})
	}
	if line.command.SkipFlagParsing || len(line.command.Subcommands) > 0 {
		return args
	}
	out := slices.Concat(args[:1], line.before, line.flags)
	if line.pending != nil {
		return out // urfave/cli refuses it; with the arguments, it would take the first one for the missing value
	}
	if line.flagsEnded || passesThrough[line.command] {
		out = append(out, "--")
	}
	return append(out, line.arguments...)
}

func isHelp(word string) bool { return word == "-h" || word == "--help" }

// findFlag returns the flag of command that a word such as --name=value or -n sets, or nil.
func findFlag(command *cli.Command, word string) cli.Flag {
	name, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(word, "-"), "-"), "=")
	for _, f := range command.Flags {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	if letters := len(name); command.UseShortOptionHandling && letters > 1 && !strings.HasPrefix(word, "--") { // -it
		return findFlag(command, "-"+name[letters-1:])
	}
	return nil
}

func takesValue(f cli.Flag) bool {
	doc, ok := f.(cli.DocGenerationFlag)
	return ok && doc.TakesValue()
}
