package main

import (
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// words are the words of a command line, sorted by what they are.
type words struct {
	before    []string     // up to the name of the command
	command   *cli.Command // has the subcommands, if nothing names one of them
	flags     []string     // its flags, each with its value behind it
	open      cli.Flag     // the last flag, if its value is missing
	arguments []string
	ended     bool // by "--": what comes is an argument, whatever it looks like
}

// handsOn is true for commands whose last arguments are a command line of another program: behind the
// first argument, no word is a flag of msb's.
var handsOn = map[*cli.Command]bool{sandboxExec: true}

// sortWords reads what comes after the program's name.
func sortWords(app *cli.App, list []string) *words {
	w := &words{command: &cli.Command{Flags: app.Flags, Subcommands: app.Commands}}
	for _, word := range list {
		switch {
		case w.open != nil:
			w.flags, w.open = append(w.flags, word), nil
		case w.ended || handsOn[w.command] && len(w.arguments) > 0:
			w.arguments = append(w.arguments, word)
		case word == "--":
			w.ended = true
		case strings.HasPrefix(word, "-") && word != "-":
			w.flags = append(w.flags, word)
			if f := flagOf(w.command, word); f != nil && !strings.Contains(word, "=") && takesValue(f) {
				w.open = f
			}
		default:
			sub := w.command.Command(word)
			if sub == nil || len(w.arguments) > 0 {
				w.arguments = append(w.arguments, word)
				continue
			}
			w.before, w.flags = slices.Concat(w.before, w.flags, []string{word}), nil
			w.command = sub
		}
	}
	return w
}

// arrange puts the flags of a command before its arguments, where urfave/cli looks for them: people
// write them behind as well.
func arrange(app *cli.App, args []string) []string {
	w := sortWords(app, args[1:])
	if w.command.SkipFlagParsing || len(w.command.Subcommands) > 0 {
		return args
	}
	out := slices.Concat(args[:1], w.before, w.flags)
	if w.open != nil {
		return out // to be refused; an argument behind it would be taken for its value
	}
	if w.ended || handsOn[w.command] {
		out = append(out, "--")
	}
	return append(out, w.arguments...)
}

// flagOf finds the flag that a word such as --name=value or -n gives.
func flagOf(command *cli.Command, word string) cli.Flag {
	name, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(word, "-"), "-"), "=")
	for _, f := range command.Flags {
		if slices.Contains(f.Names(), name) {
			return f
		}
	}
	return nil
}

func takesValue(f cli.Flag) bool {
	doc, ok := f.(cli.DocGenerationFlag)
	return ok && doc.TakesValue()
}
