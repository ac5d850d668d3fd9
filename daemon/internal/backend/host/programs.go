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

// FindQEMU and FindVirtiofsd resolve a configured path, or find the distribution's. What is not there is
// errdefs.ErrFailedPrecondition.
func FindQEMU(configured string) (string, error) {
	return findProgram("QEMU", configured, "qemu-system-x86", "qemu-system-x86_64")
}

// FindVirtiofsd is described with FindQEMU.
func FindVirtiofsd(configured string) (string, error) {
	return findProgram("virtiofsd", configured, "qemu-system-common (or virtiofsd)",
		"virtiofsd", "/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd")
}

// VirtiofsdCommand is how to run the virtiofsd at path: a program that takes the options of the one in Rust, and what
// comes before them. For the one in C, which came with QEMU up to 7.2, that is the translator.
func VirtiofsdCommand(ctx context.Context, path, translator string) ([]string, error) {
	_, said, err := askVersion(ctx, path, virtiofsdVersionRE)
	if err != nil {
		return nil, err
	}
	if !inC(said) {
		return []string{path}, nil
	}
	if translator, err = findProgram("msb-virtiofsd", translator, ""); err != nil {
		return nil, err
	}
	return []string{translator, "--daemon=" + path}, nil
}

// inC tells from what a virtiofsd says of its version whether it is the one in C: QEMU's programs name their author.
func inC(said string) bool { return strings.Contains(said, "Bellard") }

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
		return "", fmt.Errorf("find %s: %s is no executable file: %w", what, configured, errdefs.ErrFailedPrecondition)
	}
	return "", fmt.Errorf("find %s: it is not installed; install Debian's package %s, or configure its path: %w",
		what, debianPackage, errdefs.ErrFailedPrecondition)
}

// programLimit is long for a program that says its version.
const programLimit = 5 * time.Second

// ask runs a program for what it says.
func ask(ctx context.Context, path string, args ...string) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, programLimit, fmt.Errorf("%s does not answer within %v", path, programLimit))
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.WaitDelay = time.Second // for what it may have started
	out, err := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	if err != nil {
		return "", fmt.Errorf("run %s: %w", path, err)
	}
	return string(out), nil
}

// What the programs say of their version.
var (
	qemuVersionRE       = regexp.MustCompile(`^QEMU emulator version ([^\s]+)`)
	virtiofsdVersionRE  = regexp.MustCompile(`^virtiofsd(?: version| backend)? v?(\d[^\s]*)`)
	kataVersionRE       = regexp.MustCompile(`version: ([^,\s]+)`)
	containerdVersionRE = regexp.MustCompile(`^containerd \S+ v?(\S+)`)
)

// askVersion runs a program with --version and returns the version with all that it says.
func askVersion(ctx context.Context, path string, re *regexp.Regexp) (version, said string, err error) {
	said, err = ask(ctx, path, "--version")
	if err != nil {
		return "", "", err
	}
	m := re.FindStringSubmatch(said)
	if m == nil {
		return "", "", fmt.Errorf("ask %s for its version: it says %.100q", path, said)
	}
	return m[1], said, nil
}
