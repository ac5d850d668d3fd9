package portal

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// defaultPath is the PATH of an environment that has none.
const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// environment returns the environment of a process: that of the portal, which comes from the image, overridden by the
// variables of user if the user was named, and then by each list of NAME=value entries.
func environment(user *account, lists ...[]string) ([]string, error) {
	env := os.Environ()
	if user.named {
		lists = append([][]string{{"HOME=" + user.home, "USER=" + user.name, "LOGNAME=" + user.name}}, lists...)
	}
	index := make(map[string]int, len(env)) // by name
	for i, entry := range env {
		name, _, _ := strings.Cut(entry, "=")
		index[name] = i
	}
	for _, list := range lists {
		if err := checkEnv(list); err != nil {
			return nil, err
		}
		for _, entry := range list {
			name, _, _ := strings.Cut(entry, "=")
			i, ok := index[name]
			if !ok {
				i = len(env)
				index[name] = i
				env = append(env, "")
			}
			env[i] = entry
		}
	}
	return env, nil
}

// checkEnv returns a gRPC status unless the entries have the form NAME=value.
func checkEnv(entries []string) error {
	for _, entry := range entries {
		name, _, ok := strings.Cut(entry, "=")
		if !ok || name == "" || strings.ContainsRune(entry, 0) {
			return status.Errorf(codes.InvalidArgument, "environment entry %q is invalid: use NAME=value", entry)
		}
	}
	return nil
}

func getenv(env []string, name string) (value string, ok bool) {
	for _, entry := range env {
		if v, found := strings.CutPrefix(entry, name+"="); found {
			return v, true
		}
	}
	return "", false
}

// directory returns the working directory for a process. workdir is that of the sandbox's configuration, and cwd that of
// the request. If both are empty, directory returns "", which stands for the portal's directory, which is that of the image.
// A relative cwd begins at workdir, and "~" stands for home. Errors are gRPC statuses.
func directory(workdir, cwd, home string) (string, error) {
	if workdir != "" && !filepath.IsAbs(workdir) {
		return "", status.Errorf(codes.InvalidArgument, "workdir %q is not absolute: use an absolute path", workdir)
	}
	if cwd == "" {
		if problem := checkDirectory(workdir); workdir != "" && problem != "" {
			// The request is right. The workdir is in the sandbox's configuration, or a process has removed it.
			return "", status.Errorf(codes.FailedPrecondition,
				"workdir %q %s: stop the sandbox and start it with another workdir, or none", workdir, problem)
		}
		return workdir, nil
	}
	dir := cwd
	if rest, ok := strings.CutPrefix(cwd, "~"); ok && (rest == "" || rest[0] == '/') {
		dir = home + rest
	}
	if !filepath.IsAbs(dir) {
		if workdir == "" {
			workdir, _ = os.Getwd()
		}
		dir = filepath.Join(workdir, dir)
	}
	if problem := checkDirectory(dir); problem != "" {
		return "", status.Errorf(codes.InvalidArgument, "cwd %q %s", cwd, problem)
	}
	return dir, nil
}

// checkDirectory returns why dir cannot be a working directory, or "".
func checkDirectory(dir string) string {
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return "does not exist in the sandbox"
	case err != nil:
		return "cannot be used: " + errors.Unwrap(err).Error()
	case !info.IsDir():
		return "is not a directory"
	}
	return ""
}
