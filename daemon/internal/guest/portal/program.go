package portal

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// This file finds the program of a command, and says why a program cannot be run. Its errors are gRPC statuses:
//
//	NotFound           there is no such program; a shell has the exit code 127 for this
//	PermissionDenied   the file exists but cannot be run; a shell has the exit code 126 for this
//	ResourceExhausted  the sandbox has no more processes, open files or memory
//	InvalidArgument    the arguments or the environment cannot be passed to any program
//
// The text of a NotFound contains "not found", because programs that use the original's SDK look for these words.

// lookPath finds the program name as a shell does. A name with a slash is a path, relative to dir. For any other name,
// lookPath searches the directories in the PATH of env.
func lookPath(name string, env []string, dir string) (string, error) {
	fromDir := func(path string) string {
		if filepath.IsAbs(path) {
			return path
		}
		return filepath.Join(dir, path)
	}
	if strings.Contains(name, "/") {
		path := fromDir(name)
		if !filepath.IsAbs(path) {
			path = "./" + path
		}
		err := checkExecutable(path)
		if errors.Is(err, fs.ErrNotExist) {
			return "", status.Errorf(codes.NotFound, "file %q not found%s", name, hint(name))
		}
		if err != nil {
			return "", startError(name, path, err)
		}
		return path, nil
	}
	search, ok := getenv(env, "PATH")
	if !ok {
		search = defaultPath
	}
	notFound := status.Errorf(codes.NotFound, "program %q not found in PATH (%s)%s", name, search, hint(name))
	for _, d := range filepath.SplitList(search) {
		if d == "" {
			d = "."
		}
		path := filepath.Join(fromDir(d), name)
		err := checkExecutable(path)
		if err == nil {
			return path, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			notFound = startError(path, path, err)
		}
	}
	return "", notFound
}

// errDirectory is returned for a directory in place of a program.
var errDirectory = errors.New("is a directory")

// checkExecutable returns an error unless the file at path can be run. It returns fs.ErrNotExist if there is no such
// file.
func checkExecutable(path string) error {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ENOTDIR), errors.Is(err, syscall.ENAMETOOLONG):
		return fs.ErrNotExist
	case err != nil:
		return err
	case info.IsDir():
		return errDirectory
	}
	return unix.Access(path, unix.X_OK)
}

// shellBuiltins are the names that only a shell knows, and that are often used as a command.
var shellBuiltins = []string{
	".", "alias", "bg", "cd", "declare", "dirs", "eval", "exec", "exit", "export", "fg", "for", "function", "history", "if",
	"jobs", "let", "local", "popd", "pushd", "read", "readonly", "set", "shift", "shopt", "source", "trap", "type", "ulimit",
	"umask", "unalias", "unset", "until", "wait", "while",
}

// shellSyntax are the characters that mean something to a shell, so that a text with one of them is not only a program and
// its arguments.
const shellSyntax = "|&;<>$`\"'\\()*?[]{}~#=!\n"

// hint returns what to do about a program that does not exist, if its name shows that it is not meant as a program. The
// command line of msb replaces the part that starts with "; use command" by its own advice.
func hint(name string) string {
	const maxExample = 100 // bytes
	const commandLine = ", because this is a command line, not the name of a program; use command "
	words := strings.Fields(name)
	switch {
	case slices.Contains(shellBuiltins, name):
		return fmt.Sprintf(`, because it is a builtin of the shell; use command "sh" with args %s`, list("-c", name+" …"))
	case len(words) < 2 && !strings.ContainsAny(name, "|&;<>$"):
		return ""
	case len(name) > maxExample:
		return commandLine + `"sh" with args ["-c", …], or put the arguments into args`
	}
	shell := `"sh" with args ` + list("-c", name)
	if strings.ContainsAny(name, shellSyntax) || slices.Contains(shellBuiltins, words[0]) {
		return commandLine + shell
	}
	return fmt.Sprintf("%s%q with args %s, or command %s", commandLine, words[0], list(words[1:]...), shell)
}

// list returns words as the API writes a list.
func list(words ...string) string {
	var quoted []string
	for _, word := range words {
		quoted = append(quoted, strconv.Quote(word))
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}

// startError returns the gRPC status for an error of fork, chdir or exec, or for one of checkExecutable. path is the
// program's file.
func startError(command, path string, err error) error {
	code, text := codes.PermissionDenied, "cannot be run: "+err.Error()
	var errno syscall.Errno
	errors.As(err, &errno)
	switch errno {
	case syscall.EAGAIN, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOSPC:
		code, text = codes.ResourceExhausted, "cannot be run: the sandbox cannot start another process: "+errno.Error()
	case syscall.ENOENT:
		code, text = codes.NotFound, "cannot be run: "+missingInterpreter(path)
	case syscall.ENOEXEC:
		text = "cannot be run: it is for another architecture, or a script without a #! line"
	case syscall.EACCES, syscall.EPERM:
		text = "is not executable"
	case syscall.E2BIG:
		code, text = codes.InvalidArgument, "cannot be run: arguments and environment are too long"
	case syscall.EINVAL:
		code, text = codes.InvalidArgument, "cannot be run: an argument contains a NUL byte"
	case 0: // errDirectory
		text = err.Error()
	}
	return status.Errorf(code, "%s %s", command, text)
}

// missingInterpreter says why the file at path cannot be run, although it exists.
func missingInterpreter(path string) string {
	const unknown = "the interpreter or loader that this program needs was not found in the image"
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return unknown
	}
	defer f.Close()
	start := make([]byte, 256) // as much as the kernel reads
	n, _ := f.Read(start)
	line, script := strings.CutPrefix(string(start[:n]), "#!")
	line, _, complete := strings.Cut(line, "\n")
	if !script || !complete {
		return unknown
	}
	interpreter := strings.TrimLeft(line, " \t")
	if strings.HasSuffix(interpreter, "\r") {
		return `its interpreter was not found, because the script has the line endings of Windows (CR LF): remove the carriage returns, as with sed -i 's/\r$//'`
	}
	interpreter, _, _ = strings.Cut(strings.ReplaceAll(interpreter, "\t", " "), " ")
	return fmt.Sprintf("the interpreter %q of this script was not found in the image", interpreter)
}
