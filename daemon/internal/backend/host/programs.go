package host

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// FindQEMU returns the absolute path of QEMU. If configured is empty, it searches PATH for the distribution's QEMU. It
// returns errdefs.ErrFailedPrecondition if there is no such program.
func FindQEMU(configured string) (string, error) {
	return findProgram("QEMU", configured, "qemu-system-x86", "qemu-system-x86_64")
}

// FindVirtiofsd is like FindQEMU but for virtiofsd. It also searches the directories where distributions install it.
func FindVirtiofsd(configured string) (string, error) {
	return findProgram("virtiofsd", configured, "qemu-system-common (or virtiofsd)",
		"virtiofsd", "/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
}

// VirtiofsdCommand returns the command that runs the virtiofsd at path. The command consists of a program and its first
// arguments, and takes the options of the Rust virtiofsd. If path is the C virtiofsd, which came with QEMU up to 7.2,
// the command runs translator, which translates the options.
func VirtiofsdCommand(ctx context.Context, path, translator string) ([]string, error) {
	_, output, err := askVersion(ctx, path, virtiofsdVersionRE)
	if err != nil {
		return nil, err
	}
	if !isCVirtiofsd(output) {
		return []string{path}, nil
	}
	if translator, err = findProgram("msb-virtiofsd", translator, ""); err != nil {
		return nil, err
	}
	return []string{translator, "--daemon=" + path}, nil
}

// isCVirtiofsd reports whether versionOutput, the output of virtiofsd --version, comes from the C virtiofsd. It looks
// for the name of QEMU's author, which all programs of QEMU print.
func isCVirtiofsd(versionOutput string) bool { return strings.Contains(versionOutput, "Bellard") }

func findProgram(what, configured, debianPackage string, candidates ...string) (string, error) {
	if configured != "" {
		candidates = []string{configured}
	}
	for _, c := range candidates {
		if path, err := exec.LookPath(c); err == nil {
			return filepath.Abs(path)
		}
	}
	if configured != "" {
		return "", fmt.Errorf("find %s: %s is not an executable file: %w", what, configured, errdefs.ErrFailedPrecondition)
	}
	return "", fmt.Errorf("find %s: not installed; install Debian's package %s or configure its path: %w",
		what, debianPackage, errdefs.ErrFailedPrecondition)
}

// versionTimeout is how long a program may take to report its version.
const versionTimeout = 5 * time.Second

// combinedOutput runs the program at path and returns its standard output and standard error.
func combinedOutput(ctx context.Context, path string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, versionTimeout, fmt.Errorf("%s did not finish within %v", path, versionTimeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.WaitDelay = time.Second // child processes of the program may keep its output open
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	if err != nil {
		return "", fmt.Errorf("run %s: %w", path, err)
	}
	return string(out), nil
}

// These match the programs' output for --version.
var (
	qemuVersionRE       = regexp.MustCompile(`^QEMU emulator version ([^\s]+)`)
	virtiofsdVersionRE  = regexp.MustCompile(`^virtiofsd(?: version| backend)? v?(\d[^\s]*)`)
	kataVersionRE       = regexp.MustCompile(`version: ([^,\s]+)`)
	containerdVersionRE = regexp.MustCompile(`^containerd \S+ v?(\S+)`)
)

// askVersion runs the program at path with --version and returns the version that re finds, and the complete output.
func askVersion(ctx context.Context, path string, re *regexp.Regexp) (version, output string, err error) {
	output, err = combinedOutput(ctx, path, "--version")
	if err != nil {
		return "", "", err
	}
	m := re.FindStringSubmatch(output)
	if m == nil {
		return "", "", fmt.Errorf("ask %s for its version: unexpected output %.100q", path, output)
	}
	return m[1], output, nil
}
