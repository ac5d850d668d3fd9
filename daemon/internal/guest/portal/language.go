package portal

import (
	_ "embed"
	"strconv"
	"strings"

	portalv1 "github.com/msbd/msbd/api/msb/portal/v1"
)

// language says how to run code in a language: by an interpreter of the image that executes a driver. To add a language,
// write a driver that speaks the protocol in session.go, and add it to the table.
type language struct {
	name    string // also that of the context of the image's user
	program string
	driver  string
	// options are the arguments of the interpreter. %d stands for the size of the driver in bytes. They do not have the driver
	// itself, which would make the output of ps unreadable.
	options []string
	// image is an image that has the interpreter.
	image string
	// interrupts says that the driver has a descriptor from which it reads interrupts in addition to SIGINT.
	interrupts bool
	// isShell says that the interpreter is a shell, whose driver repl.sh describes.
	isShell bool
}

//go:embed repl.py
var pythonDriver string

//go:embed repl.js
var nodeDriver string

//go:embed repl.sh
var bashDriver string

var languages = map[portalv1.RunCodeRequest_Language]*language{
	portalv1.RunCodeRequest_LANGUAGE_PYTHON: {
		name: "python", program: "python3", driver: pythonDriver,
		// The code can change the builtins, so the driver has a copy.
		options: []string{"-c", "import os, builtins; exec(compile(os.read(3, %d), '<repl>', 'exec'), {'__builtins__': dict(vars(builtins))})"},
		image:   "microsandbox/python",
	},
	portalv1.RunCodeRequest_LANGUAGE_NODE: {
		name: "node", program: "node", driver: nodeDriver,
		// Code that is terminated leaves the stack of asynchronous hooks in disorder, for which Node would abort.
		// The name [eval] lets the driver recognize its own frames, as if it were the argument.
		options: []string{"--no-force-async-hooks-checks", "-e",
			"{ const b = Buffer.alloc(%d); fs.readSync(3, b); vm.runInThisContext(b.toString(), '[eval]')((s) => import(s)) }"},
		image: "microsandbox/node", interrupts: true,
	},
	portalv1.RunCodeRequest_LANGUAGE_BASH: {
		name: "bash", program: "bash", driver: bashDriver,
		options: []string{"--norc", "--noprofile", "--noediting", "-i"},
		image:   "microsandbox/python", isShell: true,
	},
}

// argv returns the arguments of the interpreter.
func (l *language) argv() []string {
	argv := []string{l.program}
	for _, option := range l.options {
		argv = append(argv, strings.ReplaceAll(option, "%d", strconv.Itoa(len(l.driver))))
	}
	return argv
}
